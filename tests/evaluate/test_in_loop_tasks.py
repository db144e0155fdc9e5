"""Tasks in the loop: no bit of training changes by them, and a row is what `evaluate` says of the
checkpoint."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.load import checkpoint_name
from pretrain.cli import main
from pretrain.config import compose, read_file
from pretrain.evaluate.examples import Example
from pretrain.evaluate.task_files import CHUNK_CHARACTERS, EvalTask, chunks_of
from pretrain.evaluate.tasks import task_of_kind
from pretrain.train.config import TrainConfig
from pretrain.train.resolve import Pace, task_interval
from runs import assert_same_run, records, stop_after, weights
from tasks import RECORDS, written
from tiny import TINY

Capture = pytest.CaptureFixture[str]
STEPS = ["--train.steps", "12", "--train.evaluate_every", "4", "--train.keep_every", "4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind of task in the documented form, named after it, and a text."""
    folder = tmp_path_factory.mktemp("tasks")
    for kind, lines in RECORDS.items():
        written(folder, lines, f"{kind}.jsonl")
    (folder / "sea.txt").write_text("The sea was calm, and the people saw it. " * 120)
    return folder


def following(files: Path, *more: str) -> list[str]:
    own = ",".join(str(files / f"{kind}.jsonl") for kind in RECORDS)
    texts = str(files / "sea.txt")
    return ["--evaluate.task_files", own, "--evaluate.texts", texts, *more]


@pytest.fixture(scope="module")
def followed_run(corpus: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "followed"
    words = following(files, "--evaluate.every", "4", "--evaluate.examples", "2")
    assert main(["train", str(corpus), *TINY, *STEPS, *words, "--run", str(folder)]) == 0
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in records(run) if row["kind"] == "task"]


def test_no_bit_of_training_changes(followed_run: Path, corpus: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    assert main(["train", str(corpus), *TINY, *STEPS, "--run", str(alone)]) == 0
    a, b = weights(alone), weights(followed_run)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert records(alone) == [r for r in records(followed_run) if r["kind"] != "task"]
    assert records(alone, "samples.jsonl") == records(followed_run, "samples.jsonl")


def test_rows_are_what_evaluate_says_of_the_checkpoint(
    followed_run: Path, files: Path, capsys: Capture
) -> None:
    names = [f"{kind}.jsonl" for kind in RECORDS]
    found = rows(followed_run)
    assert [(r["step"], r["task"]) for r in found] == [
        (step, name) for step in (4, 8, 12) for name in (*names, "sea.txt")
    ]
    for step in (4, 12):
        at = followed_run / "checkpoints" / checkpoint_name(step)
        words = ["--task-file", *(str(files / name) for name in names), "--limit", "2"]
        capsys.readouterr()
        assert main(["evaluate", str(at), *words, "--device", "cpu", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)["tasks"]
        for row in (r for r in found if r["step"] == step and r["task"] != "sea.txt"):
            theirs = said[str(files / row["task"])]
            assert {k: row[k] for k in ("metric", "value", "stderr", "examples")} == {
                k: theirs[k] for k in ("metric", "value", "stderr", "examples")
            }
    first, last = (r["value"] for r in found if r["task"] == "sea.txt" and r["step"] != 8)
    assert last < first  # bits per byte fall


def test_the_end_has_the_last_rows_and_what_guessing_reaches(followed_run: Path) -> None:
    tasks = json.loads((followed_run / "summary.json").read_text())["tasks"]
    assert [*tasks] == [f"{kind}.jsonl" for kind in RECORDS] + ["sea.txt"]
    last = {row["task"]: row for row in rows(followed_run) if row["step"] == 12}
    assert all(tasks[name]["value"] == row["value"] for name, row in last.items())
    # Two examples of three choices; two of two contexts; pairs.
    assert tasks["choice.jsonl"]["chance"] == pytest.approx(1 / 3)
    assert (tasks["schema.jsonl"]["chance"], tasks["pair.jsonl"]["chance"]) == (0.5, 0.5)
    assert tasks["cloze.jsonl"]["chance"] is None
    # 2 passages of at most 2,000 characters, of 4,920.
    assert tasks["sea.txt"]["examples"] == 2
    assert tasks["sea.txt"]["stderr"] is not None


@pytest.mark.parametrize("stop_at", [4, 7])
def test_a_resumed_run_goes_on_asking(
    followed_run: Path,
    corpus: Path,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    """Stopped in a step after which all is asked, it asks first when it goes on."""
    run = tmp_path / "stopped"
    words = following(files, "--evaluate.every", "4", "--evaluate.examples", "2")
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        assert main(["train", str(corpus), *TINY, *STEPS, *words, "--run", str(run)]) == 143
    assert {row["step"] for row in rows(run)} == ({4} if stop_at == 7 else set())
    assert main(["train", "--resume", "--run", str(run)]) == 0
    assert_same_run(followed_run, run)


def test_what_is_followed_may_change_at_any_time(
    corpus: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert main(["train", str(corpus), *TINY, *STEPS, "--run", str(run)]) == 143
    # Nothing was followed, so how often is decided now, and stays.
    monkeypatch.setenv("PRETRAIN_TASKS", str(files))
    resume = ["train", "--resume", "--run", str(run)]
    monkeypatch.chdir(files)
    assert main([*resume, "--evaluate.task_files", "pair.jsonl"]) == 0
    config = compose([read_file(run / "config.yaml")]).evaluate
    assert config.task_files == (str(files / "pair.jsonl"),)
    assert config.every in (4, 8, 12)
    assert rows(run)[-1]["step"] == 12
    assert not (run / "changes.jsonl").exists()
    assert main(["extend", str(run), "--train.steps", "20", "--evaluate.every", "5"]) == 0
    assert {15, 20} <= {row["step"] for row in rows(run)}


def test_wrong_names_and_files_are_refused_before_anything_is_made(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("PRETRAIN_TASKS", raising=False)
    run, other = tmp_path / "run", written(tmp_path, RECORDS["pair"], "pair.jsonl")
    (tmp_path / "twin").mkdir()
    twin = written(tmp_path / "twin", RECORDS["pair"], "pair.jsonl")
    written(tmp_path, RECORDS["choice"], "piqa.jsonl")
    (tmp_path / "none.jsonl").write_text("")
    packed = gzip.compress(random.Random(0).randbytes(4000).hex().encode())
    (tmp_path / "cut.txt.gz").write_bytes(packed[: len(packed) // 2])

    def refusal(*words: str) -> str:
        assert main(["train", str(corpus), *TINY, *STEPS, *words, "--run", str(run)]) == 2
        assert not run.exists()
        return capsys.readouterr().err

    assert "unknown task 'lambad'; did you mean 'lambada'?" in refusal("--evaluate.tasks", "lambad")
    assert "task piqa needs the file piqa.jsonl" in refusal("--evaluate.tasks", "piqa")
    here = ["--evaluate.task_data", str(tmp_path)]
    assert "is not the file of task piqa" in refusal("--evaluate.tasks", "piqa", *here)
    assert "contains no example" in refusal("--evaluate.task_files", str(tmp_path / "none.jsonl"))
    assert "missing.txt" in refusal("--evaluate.texts", str(tmp_path / "missing.txt"))
    cut = refusal("--evaluate.texts", str(tmp_path / "cut.txt.gz"))
    assert "only a part of the text would be scored" in cut
    assert "two in-loop tasks have the name pair.jsonl" in refusal(
        "--evaluate.task_files", f"{other},{twin}"
    )
    assert "evaluate.examples is 0" in refusal("--evaluate.examples", "0")


@given(st.text(alphabet=" \n\tab\u00e9\u3000", max_size=3 * CHUNK_CHARACTERS))
def test_passages_are_the_text(text: str) -> None:
    found = list(chunks_of(text * 3))
    assert "".join(found) == text * 3
    assert all(0 < len(part) <= CHUNK_CHARACTERS for part in found)


def test_passages_end_with_words() -> None:
    text = "word " * 1000
    assert [len(part) for part in chunks_of(text)] == [1999, 1995, 1006]
    assert all(not part.endswith("wor") for part in chunks_of(text))
    assert [len(part) for part in chunks_of("a" * 4500)] == [2000, 2000, 500]


def test_chance_is_the_mean_of_one_in_so_many() -> None:
    examples = (Example(("q",), ("a", "b")), Example(("q",), ("a", "b", "c", "d")))
    assert EvalTask(task_of_kind("choice", "mine"), examples).chance == 0.375


@pytest.mark.parametrize(
    ("asking", "every"),
    # 1,000 steps of 0.1 s leave 3 s: ten times 0.3 s, four times 0.75 s, once 2 s, never 5 s.
    [(0.01, 100), (0.3, 100), (0.4, 200), (0.75, 300), (1.5, 500), (2.0, 1000), (5.0, 1000)],
)
def test_asking_costs_three_hundredths_of_training(asking: float, every: int) -> None:
    train = TrainConfig(steps=1000, evaluate_every=100)
    assert task_interval(train, Pace(0.1, asking)) == every
    times = -(-1000 // every)
    assert times * asking <= 0.03 * 100 + 1e-9 or every == 1000
