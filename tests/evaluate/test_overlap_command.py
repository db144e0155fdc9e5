"""evaluate --overlap: both tables, continuations of held-out text, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.cli import main
from pretrain.corpus.overlap import TextOverlap
from pretrain.corpus.words import split_words
from pretrain.data.format import PreparedData, open_prepared
from pretrain.data.preparation import prepare
from pretrain.evaluate import overlap as memorisation
from pretrain.evaluate.overlap import (
    CONTINUATIONS,
    GENERATED_TOKENS,
    PROMPT_TOKENS,
    _held_out_spans,
    document_texts,
    score_without_overlap,
)
from pretrain.report.page import write_report
from tiny import TINY

SEA = "The sea was calm, and the SEA was wide; the sun went down at nine."  # 15 words, 8 n-grams


def test_metric_without_examples_of_the_corpus() -> None:
    def example(*flags: bool) -> TextOverlap:
        return TextOverlap("", "", np.arange(len(flags), dtype=np.uint64), np.array(flags, bool))

    right = np.array([[1, 1], [1, 1], [0, 1], [1, 1]], float)
    found = [example(False), example(True, False), example(False, False), example()]
    score = score_without_overlap("accuracy", right, found)
    assert (score["value"], score["examples_without"]) == (0.75, 3)
    assert score["value_without"] == pytest.approx(2 / 3)
    assert score_without_overlap("accuracy", right[:1], [example(True)])["value_without"] is None


def held_out(folder: Path, texts: list[str]) -> PreparedData:
    file = folder / "t.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare(file, folder / "out", tokenizer="bytes", val_fraction=0.4)


def test_continuations_stay_in_one_document(tmp_path: Path) -> None:
    texts = [chr(97 + n % 26) * (n * n + 1) for n in range(40)]
    data = held_out(tmp_path, texts)
    stream, tokenizer = data.split("val"), data.tokenizer()
    places = _held_out_spans(stream)
    assert 10 < len(places) <= CONTINUATIONS
    for begin, middle, end in places:
        assert begin <= middle < end <= middle + GENERATED_TOKENS
        assert middle - begin <= PROMPT_TOKENS
        assert len(set(tokenizer.decode(stream.read(begin, end)))) == 1
        assert tokenizer.end_of_text not in stream.read(begin, end)
    assert max(end - begin for begin, _, end in places) == PROMPT_TOKENS + GENERATED_TOKENS


@pytest.fixture(scope="module")
def own_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on its own text, which tests may move."""
    folder = tmp_path_factory.mktemp("memorisation")
    # In another order than other tests' text: the cache would return theirs.
    lines = corpus.read_bytes().splitlines(keepends=True)
    (folder / "text.jsonl").write_bytes(b"".join(reversed(lines)))
    words = ["train", str(folder / "text.jsonl"), "--run", str(folder / "run"), *TINY]
    assert main([*words, "--train.steps", "1"]) == 0
    return folder / "run"


def evaluate_overlap(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched:  # fewer than usual, to be fast
        patched.setattr(memorisation, "CONTINUATIONS", 3)
        return _evaluate_overlap(capsys, *words)


def _evaluate_overlap(
    capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[dict[str, Any], str]:
    assert main(["evaluate", *words, "--device", "cpu", "--overlap", "--json"]) == 0
    output = capsys.readouterr()
    return json.loads(output.out), output.err


def test_evaluate_writes_both_tables(
    own_run: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = next(
        found
        for found in map(open_prepared, (cache / "prepared").glob("*"))
        if found.split("train").sha256
        == json.loads((own_run / "environment.json").read_text())["fingerprint"]["training text"]
    )
    texts = [text for _, text in document_texts(data.split("train"), data.tokenizer())]
    copied = split_words(texts[5])[40:70]
    # What the model wrote at a step is a copy of 30 words of the training text.
    with open(own_run / "samples.jsonl", "a") as file:
        text = "Xyzzy " + " ".join(copied)
        file.write(json.dumps({"step": 1, "prompt": "Xyzzy", "text": text}) + "\n")
    records = [
        {"context": " ".join(copied[:10]), "continuation": "xyzzy xyzzy"},  # 3 n-grams of 5
        {"context": "qq ww ee rr tt yy uu", "continuation": "ii oo"},  # none of 2
        {"context": "We, the", "continuation": "people"},  # too short
    ]
    mine, plain = tmp_path / "mine.jsonl", tmp_path / "plain.txt"
    mine.write_text("".join(json.dumps(record) + "\n" for record in records))
    plain.write_text("Xyzzy.")
    words = [str(own_run), "--task-file", str(mine), "--text", str(plain)]
    found, err = evaluate_overlap(capsys, *words, "--shots", "1")
    assert "reading" in err
    overlap = found["overlap"]
    assert json.loads((own_run / "overlap.json").read_text()) == overlap
    assert overlap["training_text"]["documents"] == len(texts)
    assert overlap["filter"]["false_positives"] < 1.05e-8

    row = overlap["sets"][str(mine)]  # the shots are not of the example
    assert (row["ngrams"], row["in_corpus"], row["percent"]) == (7, 3, 42.857)
    assert (row["examples"], row["too_short"], row["without"]) == (3, 1, 1)
    assert (row["most"]["example"], row["most"]["percent"]) == ("example 0", 60.0)
    assert (row["score"]["metric"], row["score"]["examples_without"]) == ("accuracy", 2)
    assert row["score"]["value"] == found["tasks"][str(mine)]["value"]
    assert f"{mine}: 42.86 % of 7; 1 of 2 texts have none, 1 more are shorter" in err
    assert f"{plain}: nothing to compare: 1 texts of fewer than 8 words" in err
    assert overlap["sets"]["held-out split"]["examples"] == data.split("val").n_documents

    sample, written, there = overlap["writing"].values()
    origin = list(data.split("train").origins())[5]
    assert (sample["longest"]["words"], sample["longest"]["text"]) == (30, " ".join(copied))
    assert sample["longest"]["document"]["id"] == origin.id
    assert sample["in_corpus"] == 23
    assert f"30 words in a row are in {origin.id}" in err
    assert written["examples"] == there["examples"] == 3

    page = (own_run / "report.html").read_text(encoding="utf-8")
    assert page.count("In training text") == 2
    assert " ".join(copied) in page
    assert "42.86 %" in page
    assert "reading" not in evaluate_overlap(capsys, *words)[1]  # the filter is kept


def test_a_damaged_filter_in_the_cache_is_computed_again(
    own_run: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = evaluate_overlap(capsys, str(own_run))
    fingerprint = json.loads((own_run / "environment.json").read_text())["fingerprint"]
    (file,) = cache.glob(f"overlap/{fingerprint['training text'][:32]}-*.npy")
    content = file.read_bytes()
    file.write_bytes(content[:200] + bytes(len(content) - 200))
    found, err = evaluate_overlap(capsys, str(own_run))
    assert f"{file} is damaged: its content has another SHA-256; it is computed again" in err
    assert found["overlap"] == expected["overlap"]
    assert file.read_bytes() == content


def test_moved_text_is_accepted_and_changed_text_rejected(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = own_run.parent / "text.jsonl"
    before, _ = evaluate_overlap(capsys, str(own_run))
    aside = text.rename(text.with_name("moved.jsonl"))
    after, _ = evaluate_overlap(capsys, str(own_run))
    assert after == before
    text.write_bytes(aside.read_bytes().replace(b"the", b"then"))
    assert main(["evaluate", str(own_run), "--overlap"]) == 2
    assert "has changed since the run" in capsys.readouterr().err
    text.unlink()
    aside.rename(text)


def test_imported_model_has_no_training_text(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(own_run), "--format", "hf", "--out", str(tmp_path / "exported")]
    assert main(["export", *words]) in (0, 2)  # without transformers it is not verified
    text = tmp_path / "t.txt"
    text.write_text(SEA)
    capsys.readouterr()
    words = ["evaluate", str(tmp_path / "exported"), "--text", str(text), "--overlap"]
    assert main(words) == 2
    assert "was not trained here, so there is no training text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        '{"sets": 3, "writing": {"a": null}}',
        '{"sets": {"<script>": {"percent": "x", "most": 4, "score": [], "longest": "<b>"}}}',
        '{"writing": {"w": {"longest": {"document": 3, "text": "<script>", "words": null}}}}',
    ],
)
def test_report_escapes_malformed_tables(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 4.5}\n')
    assert "In training text" not in write_report(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "overlap.json").write_text(content)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "4.5" in page
    assert "<script" not in page
    assert "<b>" not in page.partition("What it has seen before")[2].partition("</section>")[0]
