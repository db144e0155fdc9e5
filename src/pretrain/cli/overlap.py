"""`evaluate --overlap`: what of evaluation sets and of a model's own texts is in its training text.

An opened run, what was asked of it and what it answered come in; overlap.json in the run's folder
and two tables in its report come out. Refused is a model whose training text is not here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.output import Output, plain
from pretrain.run.directory import write_json
from pretrain.runner.text import cache_folder, text_of_run

if TYPE_CHECKING:
    from pretrain.corpus.bloom import BloomFilter
    from pretrain.data import PreparedData
    from pretrain.evaluate import EvalTask, TaskResults
    from pretrain.runner.open import LoadedModel

OVERLAP = "overlap.json"
# Of what a filter holds: another number whenever words are told or hashed in another way.
_KEPT_AS = 1


def training_text(model: LoadedModel) -> PreparedData:
    """What a model was trained on; ValueError where it was not trained here, or the text is
    another."""
    seen = None if model.checkpoint is None else model.checkpoint.state.get("fingerprint")
    if seen is None:
        raise ValueError(
            f"{model.path} was not trained here, so there is no training text for --overlap to "
            "compare with"
        )
    return text_of_run(model.config, seen)


def measure(
    model: LoadedModel,
    data: PreparedData,
    answered: Sequence[tuple[EvalTask, TaskResults]],
    *,
    arguments: argparse.Namespace,
    output: Output,
) -> dict[str, Any]:
    """Both tables, said and written into the run's folder."""
    from pretrain.report import write_report

    assert model.checkpoint is not None
    train, folder = data.split("train"), model.path.parent.parent
    corpus = _corpus_filter(data, output)
    content: dict[str, Any] = {
        "checkpoint": model.path.relative_to(folder).as_posix(),
        "training_text": {"documents": train.n_documents, "bytes": train.n_bytes},
        "filter": {"bytes": corpus.n_bytes, "false_positives": corpus.false_positives},
        "sets": _sets(data, corpus, answered, arguments),
        "writing": _writing(model, data, corpus, arguments, output),
    }
    output.say("8 words in a row that are in the training text too:")
    for name, row in {**content["sets"], **content["writing"]}.items():
        output.say(f"  {name}: {_said(row)}")
    write_json(folder / OVERLAP, plain(content))
    output.say(f"written to {folder / OVERLAP} and {write_report(folder)}")
    return content


def _said(row: dict[str, Any]) -> str:
    if row["percent"] is None:
        return f"nothing to compare: {row['examples']:,} texts of fewer than 8 words"
    said = (
        f"{row['percent']:.2f} % of {row['ngrams']:,}; {row['without']:,} of "
        f"{row['examples'] - row['too_short']:,} texts have none"
    )
    if row["too_short"]:
        said += f", {row['too_short']:,} more are shorter"
    if row.get("score"):
        score, value = row["score"], row["score"]["value_without"]
        said += f"; {score['metric']} {score['value']:.4f}"
        if value is not None:
            said += f", {value:.4f} over the {score['examples_without']:,} without any"
    if row.get("longest"):
        longest = row["longest"]
        said += f"; {longest['words']} words in a row are in {longest['document']['id']}"
    return said


def _corpus_filter(data: PreparedData, output: Output) -> BloomFilter:
    """The training text's n-grams: made once, and kept in the cache."""
    from pretrain.corpus.bloom import BloomFilter
    from pretrain.corpus.overlap import corpus_ngram_filter
    from pretrain.evaluate.documents import document_texts

    stream = data.split("train")
    key = f"{stream.sha256[:32]}-{data.manifest.tokenizer_sha256[:16]}-{_KEPT_AS}"
    path = cache_folder() / "overlap" / f"{key}.npy"
    if not path.exists():
        output.say(f"reading {stream.n_bytes:,} bytes of training text, once ...")
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = data.tokenizer()
        corpus_ngram_filter(lambda: document_texts(stream, tokenizer)).save(path)
    return BloomFilter.open(path)


def _sets(
    data: PreparedData,
    corpus: BloomFilter,
    answered: Sequence[tuple[EvalTask, TaskResults]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """A row for each evaluation set; the held-out split, which is of the same source as the
    training text, is what the others are to be compared with."""
    from pretrain.corpus import read_documents
    from pretrain.corpus.overlap import measure_overlap
    from pretrain.evaluate.documents import document_texts
    from pretrain.evaluate.overlap import row_of, score_without

    held_out = data.split("val")
    ids = (origin.id for _, origin in held_out.origins(lambda *_: True))
    documents = document_texts(held_out, data.tokenizer(), piece_tokens=held_out.n_tokens)
    named = zip(ids, (text for _, text in documents), strict=True)
    rows = {"held-out split": row_of(measure_overlap(named, corpus))}
    for file in arguments.text or []:
        texts = read_documents(file, text_field=arguments.text_field)
        rows[file] = row_of(measure_overlap(((each.id, each.text) for each in texts), corpus))
    for asked, results in answered:
        found = measure_overlap(_numbered(asked.solved_texts), corpus)
        metric = asked.task.metric
        score = score_without(metric, results.statistics[metric], found)
        rows[asked.task.name] = row_of(found) | {"score": score}
    return rows


def _numbered(texts: Iterable[str]) -> Iterable[tuple[str, str]]:
    return ((f"example {number}", text) for number, text in enumerate(texts))


def _writing(
    model: LoadedModel,
    data: PreparedData,
    corpus: BloomFilter,
    arguments: argparse.Namespace,
    output: Output,
) -> dict[str, Any]:
    """A row for what the model wrote while it was trained, for what it writes after held-out text,
    and for what stands there."""
    from pretrain.corpus.overlap import measure_overlap
    from pretrain.evaluate.overlap import continue_held_out, longest_of, row_of
    from pretrain.generate import pack_weights

    output.say("continuing held-out text ...")
    pack_weights(model.decoder)
    found = continue_held_out(
        model.decoder,
        model.tokenizer,
        data.split("val"),
        world=model.world,
        precision=model.precision,
        seed=arguments.seed,
    )
    sets = {
        "samples.jsonl": _samples(model.path.parent.parent),
        "continuations of held-out text": [each.written for each in found],
        "the held-out text there": [each.held_out for each in found],
    }
    rows: dict[str, Any] = {
        name: row_of(measure_overlap(_numbered(texts), corpus))
        for name, texts in sets.items()
        if texts
    }
    longest = longest_of([sets[name] for name in rows], data.split("train"), data.tokenizer())
    for row, stretch in zip(rows.values(), longest, strict=True):
        row["longest"] = stretch
    return rows


def _samples(folder: Path) -> list[str]:
    from pretrain.report import read_run_config

    samples = read_run_config(folder).samples
    return [str(s.get("text")).removeprefix(str(s.get("prompt") or "")) for s in samples]
