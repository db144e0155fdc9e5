"""Standard errors and comparisons: equal to theory, and a model compared with itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.cli import main
from pretrain.evaluate.bootstrap import compare, estimate
from pretrain.evaluate.metrics import Array
from tiny import TINY


def right_or_wrong(p: float, n: int, seed: int) -> Array:
    """Answers of a model that is right with probability p (examples, 2)."""
    right = np.random.default_rng(seed).random(n) < p
    return np.stack([right, np.ones(n)], axis=1).astype(np.float64)


def test_the_standard_error_equals_that_of_a_mean() -> None:
    rows = right_or_wrong(0.3, 800, seed=7)  # another stream than the resampling's
    found = estimate("accuracy", rows, seed=1)
    share = rows[:, 0].mean()
    error = math.sqrt(share * (1 - share) / 800)
    assert found.value == share
    assert found.stderr == pytest.approx(error, rel=0.07)
    assert found == estimate("accuracy", rows, seed=1)
    assert found.stderr != estimate("accuracy", rows, seed=2).stderr
    # z of 5 % on two sides is 1.960, that of 80 % power 0.842; two models make sqrt(2).
    assert found.stderr is not None
    assert found.detectable == pytest.approx(2.8016 * math.sqrt(2) * found.stderr, rel=1e-4)


def test_the_standard_error_of_a_ratio_equals_the_delta_method() -> None:
    rng = np.random.default_rng(3)
    n_bytes = rng.integers(50, 500, 600).astype(np.float64)
    bits = n_bytes * (1.2 + 0.2 * rng.standard_normal(600))
    found = estimate("bits_per_byte", np.stack([bits, n_bytes], axis=1), seed=1)
    ratio = bits.sum() / n_bytes.sum()
    residuals = bits - ratio * n_bytes
    error = math.sqrt(600 * residuals.var(ddof=1)) / n_bytes.sum()
    assert found.value == pytest.approx(ratio)
    assert found.stderr == pytest.approx(error, rel=0.07)


def test_a_perplexity_is_resampled_as_a_whole() -> None:
    nats = np.random.default_rng(4).normal(3.0, 0.5, 500)
    found = estimate("perplexity", np.stack([nats, np.ones(500)], axis=1), seed=1)
    assert found.value == pytest.approx(math.exp(nats.mean()))
    assert found.stderr == pytest.approx(found.value * 0.5 / math.sqrt(500), rel=0.1)


def test_one_example_has_no_error() -> None:
    rows = np.array([[1.0, 1.0]])
    assert estimate("accuracy", rows, seed=1).stderr is None
    found = compare("accuracy", rows, 0 * rows + [0, 1], seed=1)
    assert (found.difference, found.stderr, found.p) == (1.0, None, None)


def test_equal_answers_have_no_detectable_difference() -> None:
    rows = np.ones((5, 2))
    found = estimate("accuracy", rows, seed=1)
    assert (found.value, found.stderr, found.detectable) == (1.0, 0.0, None)
    same = compare("accuracy", rows, rows, seed=1)
    assert (same.difference, same.stderr, same.p, same.detectable) == (0.0, 0.0, 1.0, None)


def test_no_detectable_difference_is_larger_than_a_metric_can_differ() -> None:
    """Of three examples the formula gives 1.07, which no two accuracies differ by."""
    few = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    for metric in ("accuracy", "accuracy_per_token", "f1", "exact_match", "rougeL"):
        found = estimate(metric, few, seed=1)
        assert found.stderr == pytest.approx(0.27, abs=0.01)
        assert found.detectable is None
    assert compare("accuracy", few, 1 - few + [0, 1], seed=1).detectable is None
    assert estimate("chrf", 100 * few, seed=1).detectable is not None  # in percent
    assert estimate("perplexity", few, seed=1).detectable is not None


def test_a_difference_is_found_where_there_is_one() -> None:
    strong, weak = right_or_wrong(0.7, 400, seed=8), right_or_wrong(0.5, 400, seed=9)
    found = compare("accuracy", strong, weak, seed=1)
    assert found.difference == pytest.approx(strong[:, 0].mean() - weak[:, 0].mean())
    spread = (strong[:, 0] - weak[:, 0]).std(ddof=1) / 20
    assert found.stderr == pytest.approx(spread, rel=0.07)
    assert found.low is not None
    assert found.high is not None
    assert found.low == pytest.approx(found.difference - 1.96 * spread, abs=0.01)
    assert found.high == pytest.approx(found.difference + 1.96 * spread, abs=0.01)
    assert found.p is not None
    assert found.p < 0.001
    other = compare("accuracy", weak, strong, seed=1)
    assert other.difference == pytest.approx(-found.difference)
    assert other.p == found.p


def test_pairing_detects_what_unpaired_errors_do_not() -> None:
    nats = np.random.default_rng(5).normal(3.0, 1.0, 200)  # examples differ much, models little
    better = np.stack([nats - 0.05, np.ones(200)], axis=1)
    worse = np.stack([nats + np.random.default_rng(6).normal(0, 0.1, 200), np.ones(200)], axis=1)
    found = compare("mean", better, worse, seed=1)
    alone = estimate("mean", better, seed=1)
    assert found.p is not None
    assert found.p < 0.01
    assert alone.detectable is not None
    assert found.detectable is not None
    assert found.detectable < abs(found.difference) < alone.detectable


def test_p_values_of_equal_models_are_uniform() -> None:
    """Of 200 comparisons without a difference about one in twenty is below 0.05."""
    found = []
    for seed in range(200):
        rows = np.random.default_rng(seed).standard_normal((2, 40))
        first, second = (np.stack([each, np.ones(40)], axis=1) for each in rows)
        found.append(compare("mean", first, second, seed=seed + 1000).p)
    values = np.array(found, np.float64)
    assert 2 <= int((values < 0.05).sum()) <= 20
    assert values.mean() == pytest.approx(0.5, abs=0.08)


def test_different_numbers_of_examples_are_rejected() -> None:
    with pytest.raises(ValueError, match="got 3 and 4"):
        compare("accuracy", np.ones((3, 2)), np.ones((4, 2)), seed=1)


@pytest.fixture(scope="module")
def other_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with another tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "other"
    words = [word if word != "400" else "300" for word in TINY]
    assert main(["train", str(corpus), "--run", str(folder), *words, "--train.steps", "3"]) == 0
    return folder


def compare_json(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["compare", *words, "--device", "cpu", "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["comparisons"]
    return rows


def test_a_missing_second_model_is_reported_before_the_first_is_evaluated(
    finished_run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(finished_run), str(tmp_path / "none"), "--text", str(corpus)]
    assert main(words) == 2
    output = capsys.readouterr()
    assert "none" in output.err
    assert f"{finished_run} ..." not in output.out + output.err


def test_compare_pairs_the_documents_of_texts(
    finished_run: Path,
    other_run: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = str(other_run), str(finished_run)
    (row,) = compare_json(capsys, *names, "--text", str(corpus))
    assert (row["metric"], row["examples"]) == (
        "bits_per_byte",
        len(corpus.read_text().split("\n")) - 1,
    )
    assert (row["first"], row["second"]) == names
    for name, value in ((names[0], row["first_value"]), (names[1], row["second_value"])):
        assert main(["evaluate", name, "--text", str(corpus), "--device", "cpu", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["text"][str(corpus)]
        assert found["bits_per_byte"] == pytest.approx(value, rel=1e-9)
    assert row["difference"] == pytest.approx(row["second_value"] - row["first_value"])
    assert row["low"] < row["difference"] < row["high"] < 0  # twelve steps are more than three
    assert row["p"] < 0.01
    file = tmp_path / "one.txt"
    file.write_text("")
    assert main(["compare", *names, "--text", str(file)]) == 2
    assert "one.txt contains no text" in capsys.readouterr().err
    file.write_text("The people of the United States.")
    (row,) = compare_json(capsys, *names, "--text", str(file))
    assert (row["examples"], row["p"], row["low"]) == (1, None, None)


def test_compare_reports_the_documents_that_it_skipped(
    finished_run: Path, other_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "part.jsonl"
    file.write_text('{"text": "The people."}\n{broken\n{"text": "The United States."}\n')
    words = ["compare", str(finished_run), str(other_run), "--text", str(file)]
    capsys.readouterr()
    assert main([*words, "--device", "cpu", "--json"]) == 0
    for protocol in json.loads(capsys.readouterr().out)["protocol"].values():
        assert protocol.keys() == {"text", str(file)}
        assert protocol[str(file)].startswith(f"{file}: skipped 1 record, ")


def test_compare_pairs_the_examples_of_tasks(
    finished_run: Path, other_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"context": f"The {word} of the", "continuation": "people"}
        for word in ("sea", "law", "States", "house", "war")
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = json.loads((finished_run / "summary.json").read_text())
    checkpoint = finished_run / "checkpoints" / Path(summary["checkpoint"]).name
    words = ["--task-file", str(file), "--metric", "perplexity"]
    same, other = compare_json(capsys, str(finished_run), str(checkpoint), str(other_run), *words)
    assert (same["difference"], same["p"], same["stderr"]) == (0.0, 1.0, 0.0)
    assert other["second"] == str(other_run)
    assert other["difference"] != 0
    assert other["low"] <= other["difference"] <= other["high"]


def test_compare_reports_missing_arguments(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(finished_run)
    for words, message in (
        ([name, "--text", "x"], "is one model"),
        ([name, name, "--text", "x"], "is one model"),
        ([name, str(tmp_path)], "compare needs a text or a task"),
        ([name, str(tmp_path), "--text", str(tmp_path / "missing")], "missing"),
    ):
        assert main(["compare", *words]) == 2
        assert message in capsys.readouterr().err
