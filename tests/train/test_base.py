"""Training that stands on a larger text (data.base): what is read, scored, refused and resumed."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.config import compose, read_file
from pretrain.corpus.reading import read_documents
from pretrain.evaluate.loss import score_stream
from pretrain.runner.open import load_model
from pretrain.runner.text import prepared_text
from pretrain.validation import ConfigError
from runs import assert_same_run, records, stop_after, train
from tiny import TINY

Capture = pytest.CaptureFixture[str]
STEPS = [*TINY, "--train.steps", "12", "--train.evaluate_every", "3"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    text = list(read_documents("bundled"))[1].text
    (tmp_path / "own.txt").write_text(text[:6000])
    return tmp_path / "own.txt"


def test_the_larger_text_is_read_alone_first_and_only_the_text_is_scored(
    corpus: Path, own: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    assert train(str(own), "--from", str(corpus), *STEPS, "--run", str(run)) == 0
    sources = [r["sources"] for r in records(run) if r["kind"] == "train"]
    assert sources[5] == {str(corpus): 6 * 256, str(own): 0}
    # Four epochs of the text would be more than half of six steps: about half are its own.
    assert 2 * 256 < sources[-1][str(own)] < 4 * 256
    out = capsys.readouterr().out
    assert f"mixed   {corpus.name} 7" in out
    summary = json.loads((run / "summary.json").read_text())
    of_base = [r["base_bits_per_byte"] for r in records(run) if r["kind"] == "evaluate"]
    assert summary["base"] == {
        "bits_per_byte": of_base[-1],
        "best_bits_per_byte": min(of_base),
    }
    assert f"larger text    {of_base[-1]:.3f} bits/byte of its held-out text" in out
    # A tenth of the text alone is scored.
    assert 500 < summary["val_bytes"] < 1300
    assert main(["evaluate", str(run)]) == 0
    assert f"{summary['val_tokens']:,} tokens" in capsys.readouterr().out


def test_a_run_that_stands_on_a_larger_text_is_resumed_exactly(
    corpus: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(own), "--from", str(corpus), *STEPS]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*words, "--run", str(whole)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert train(*words, "--run", str(parts)) == 143
    assert train("--resume", "--run", str(parts)) == 0
    assert_same_run(whole, parts)


def test_a_model_may_be_stood_on_too(finished_run: Path, own: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--train.steps", "1", "--train.batch_tokens", "256", "--train.threads", "1"]
    assert train(str(own), "--from", str(finished_run), *words, "--run", str(run)) == 0
    config = compose([read_file(run / "config.yaml")])
    assert config.train.init_from is not None
    assert config.train.init_from.startswith(str(finished_run))
    assert config.data.base is None


@pytest.mark.parametrize("own_bytes", [6000, 60_000])
def test_minutes_are_at_most_one_reading_of_the_larger_text(
    corpus: Path, tmp_path: Path, own_bytes: int
) -> None:
    """Of the text four, or half of the second half of the steps."""
    texts = [document.text for document in list(read_documents("bundled"))[1::7]]
    (tmp_path / "own.txt").write_text("\n".join(texts)[:own_bytes], encoding="utf-8")
    words = [*TINY, "--train.minutes", "9", "--train.evaluate_every", "100000"]
    args = [*words, "--train.members", "1", "--run", str(tmp_path / "run")]
    assert train(str(tmp_path / "own.txt"), "--from", str(corpus), *args) == 0
    of_base, of_own = json.loads((tmp_path / "run/summary.json").read_text())["sources"].values()
    assert of_base["epochs"] == pytest.approx(1, abs=0.03)
    assert of_own["share"] == pytest.approx(0.25, abs=0.01) or of_own["epochs"] == pytest.approx(
        4, abs=0.3
    )


def test_a_model_is_measured_before_it_is_trained_on(
    finished_run: Path, own: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["--train.steps", "1", "--train.batch_tokens", "256", "--train.threads", "1"]
    settings = ["--data.val_fraction", "0.5"]
    other = tmp_path / "other.txt"
    other.write_text("".join(chr(0x430 + i * i % 31) for i in range(9000)), encoding="utf-8")
    found = {}
    for name, text in (("own", own), ("other", other)):
        args = [str(text), "--from", str(finished_run), *words, *settings]
        assert train(*args, "--run", str(tmp_path / name)) == 0
        out = " ".join(capsys.readouterr().out.split())
        first = re.search(r"before the first step the weights have ([\d.]+) bits/byte", out)
        single = re.search(r"single tokens of the text ([\d.]+): the model knows nothing", out)
        assert first
        found[name] = float(first[1])
        if name == "other":
            assert single
            assert float(single[1]) < found[name]
    val = prepared_text(compose([read_file(tmp_path / "own" / "config.yaml")])).split("val")
    assert found["own"] == pytest.approx(
        score_stream(load_model(finished_run), val).bits_per_byte, rel=0.02
    )


def test_a_text_in_another_alphabet_is_refused_before_training(
    corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = "море лес гора река небо поле дом окно дверь стол книга слово".split()
    lines = [" ".join(words[(i * k) % 12] for k in range(1, 9)) for i in range(400)]
    (tmp_path / "other.txt").write_text("\n".join(lines), encoding="utf-8")
    run = tmp_path / "run"
    assert train(str(tmp_path / "other.txt"), "--from", str(corpus), *STEPS, "--run", str(run)) == 2
    message = capsys.readouterr().err
    assert f"data.base {corpus} does not help here: counts of the text alone give" in message
    assert "train without it" in message
    assert not run.exists()


def test_a_text_of_short_lines_may_stand_on_one_of_long_paragraphs(
    corpus: Path, tmp_path: Path
) -> None:
    """Each line break is news to the larger text, whose counts alone are worse than anything."""
    text = list(read_documents("bundled"))[1].text[:9000]
    wrapped = "\n".join(textwrap.wrap(text, 10))
    (tmp_path / "lines.txt").write_text(wrapped, encoding="utf-8")
    words = [*TINY, "--train.steps", "2", "--run", str(tmp_path / "run")]
    assert train(str(tmp_path / "lines.txt"), "--from", str(corpus), *words) == 0


@pytest.mark.parametrize(
    "source", ["bundled", [{"path": "a.txt", "weight": 1}], ["a.txt", "bundled"]]
)
def test_the_larger_text_must_be_another_one(source: object) -> None:
    with pytest.raises(ConfigError, match=r"data.base is 'bundled'; data.source must be another"):
        compose([{"data": {"source": source, "base": "bundled"}}])


def test_a_larger_text_that_is_missing_is_named(own: Path, tmp_path: Path, capsys: Capture) -> None:
    assert train(str(own), "--from", str(tmp_path / "nothing.txt"), *STEPS) == 2
    assert "nothing.txt" in capsys.readouterr().err


def test_a_prepared_folder_cannot_stand_on_a_text(
    corpus: Path, own: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "prepared"
    assert main(["prepare", str(own), "--out", str(folder), "--vocab-size", "300"]) == 0
    assert train(str(folder), "--from", str(corpus), "--train.steps", "2") == 2
    assert "data.base must come with texts, not with a prepared folder" in capsys.readouterr().err


def test_the_larger_text_may_be_prepared(corpus: Path, own: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "prepared", tmp_path / "run"
    assert main(["prepare", str(corpus), "--out", str(folder), "--vocab-size", "400"]) == 0
    assert train(str(own), "--from", str(folder), *STEPS, "--run", str(run)) == 0
    sources = records(run)[0]["sources"]
    assert sources == {str(folder): 256, str(own): 0}


def test_a_profile_is_of_both_texts(corpus: Path, own: Path, capsys: Capture) -> None:
    assert train(str(own), "--from", str(own), *STEPS, "--profile") == 2
    assert "data.source must be another text" in capsys.readouterr().err
