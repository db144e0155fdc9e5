"""Write a corpus that demonstrates tasks, for `pretrain train multitask`: articles as plain text,
and tasks made from them and from aligned translations. A title or translation that is in test/ is
not in train/; the same text under two titles may be in both.

pretrain demonstrate wikipedia.jsonl --translations multi30k/ --out demonstrations
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from pretrain.cli.options import option
from pretrain.cli.out_folder import resolve_out, work_folder
from pretrain.cli.output import Output
from pretrain.corpus.demonstrations import (
    article_demonstrations,
    is_held_out,
    translation_demonstrations,
)
from pretrain.evaluate.examples import demonstration
from pretrain.evaluate.task_files import read_task_file
from pretrain.evaluate.tasks import task_named
from pretrain.machine import this_command

TEST_FRACTION = 0.04
# Translations in one document, under one heading.
_TRANSLATIONS_PER_DOCUMENT = 4
_ALIGNED = re.compile(r"(?P<name>.*(?P<split>train|test).*)\.(?P<language>en|fr|de)(\.\w+)?")

OPTIONS = (
    option(
        "ARTICLES",
        "records with a title and a text, such as an encyclopedia as JSON lines",
        nargs="+",
    ),
    option(
        "--translations DIR",
        "folder of files NAME.train.en, .fr, .de and NAME.test.en, ...: one sentence a line",
    ),
    option("--out DIR", "new folder", "demonstrations"),
)


def run(args: argparse.Namespace, output: Output) -> None:
    out = resolve_out(args.out)
    aligned = list(_aligned(Path(args.translations))) if args.translations else []
    counts = Counter[str]()
    with work_folder(out) as work, ExitStack() as opened:
        files: dict[str, TextIO] = {}
        for name, record in chain(_article_records(args.articles, output), _translations(aligned)):
            if name not in files:
                path = work / name
                path.parent.mkdir(parents=True, exist_ok=True)
                files[name] = opened.enter_context(path.open("w", encoding="utf-8"))
            files[name].write(json.dumps(record, ensure_ascii=False) + "\n")
            counts[name] += 1
    for name, count in counts.items():
        output.log(f"{count:>9,}  {out / name}")
    if out == Path("demonstrations").resolve():  # where the recipe looks for them
        output.log(f"train on them: {this_command()} train multitask")
    output.result({"out": str(out), "documents": dict(counts)})


def _article_records(sources: list[str], output: Output) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a file and a record for it: each article, and the demonstrations made from it."""
    n_titles = 0
    for document in output.documents(sources):
        n_titles += bool(document.title)
        is_test = is_held_out(document.title or document.id, TEST_FRACTION)
        record = {"id": document.id, "title": document.title, "text": document.text}
        yield f"{'test' if is_test else 'train'}/articles.jsonl", record
        if not document.title:
            continue
        for task, example in article_demonstrations(document.title, document.text):
            if is_test:
                yield f"test/{task}.jsonl", example
            else:
                text = demonstration(task_named(task), [example])
                yield f"train/{task}.jsonl", {"id": f"{task}:{document.id}", "text": text}
    if not n_titles:
        raise ValueError(
            f"{', '.join(sources)}: there is no record with a title; records must have titles and "
            "texts"
        )


def _aligned(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the split, and a text in each language. ValueError if the files are not aligned."""
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        if match := _ALIGNED.fullmatch(path.name):
            # Not splitlines, which also splits at characters that occur within a sentence.
            lines = read_task_file(path).removesuffix("\n").split("\n")
            found[match["split"], match["name"]][match["language"]] = lines
    if {split for split, _ in found} != {"train", "test"}:
        raise ValueError(f"{folder} has no files such as NAME.train.en and NAME.test.en")
    for (split, name), languages in found.items():
        counts = {language: len(lines) for language, lines in languages.items()}
        if "en" not in counts or len(counts) < 2 or len(set(counts.values())) > 1:
            raise ValueError(
                f"{folder / name} has lines {counts}; every language must have as many as en"
            )
        for texts in zip(*languages.values(), strict=True):
            yield split, dict(zip(languages, map(str.strip, texts), strict=True))


def _translations(
    aligned: list[tuple[str, dict[str, str]]],
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield a file and a record for it: translations, several of a task in one document."""
    test_texts = {text for split, each in aligned if split == "test" for text in each.values()}
    tasks: dict[str, list[dict[str, str]]] = defaultdict(list)
    for split, texts in aligned:
        if not all(texts.values()):
            continue
        if split == "train" and not test_texts.isdisjoint(texts.values()):
            continue  # it would be in both splits
        for task, example in sorted(translation_demonstrations(texts), key=lambda each: each[0]):
            if split == "test":
                yield f"test/{task}.jsonl", example
            else:
                tasks[task].append(example)
    for task, every in tasks.items():
        for first in range(0, len(every), _TRANSLATIONS_PER_DOCUMENT):
            shots = every[first : first + _TRANSLATIONS_PER_DOCUMENT]
            text = demonstration(task_named(task), shots)
            yield "train/translate.jsonl", {"id": f"{task}:{first}", "text": text}
