"""In-loop tasks change no bit of training, and a row equals what `evaluate` reports for the
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
from tasks import RECORDS, write_task
from tiny import TINY

Capture = pytest.CaptureFixture[str]
STEPS = ["--train.steps", "12", "--train.evaluate_every", "4", "--train.keep_every", "4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind of task in the documented form, named after it, and a text."""
    folder = tmp_path_factory.mktemp("tasks")
    for kind, lines in RECORDS.items():
        write_task(folder, lines, f"{kind}.jsonl")
    (folder / "sea.txt").write_text("The sea was calm, and the people saw it. " * 120)
    return folder


def task_flags(files: Path, *more: str) -> list[str]:
    own = ",".join(str(files / f"{kind}.jsonl") for kind in RECORDS)
    texts = str(files / "sea.txt")
    return ["--evaluate.task_files", own, "--evaluate.texts", texts, *more]


@pytest.fixture(scope="module")
def run_with_tasks(corpus: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "with_tasks"
    words = task_flags(files, "--evaluate.every", "4", "--evaluate.examples", "2")
    assert main(["train", str(corpus), *TINY, *STEPS, *words, "--run", str(folder)]) == 0
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in records(run) if row["kind"] == "task"]


def test_no_bit_of_training_changes(run_with_tasks: Path, corpus: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    assert main(["train", str(corpus), *TINY, *STEPS, "--run", str(alone)]) == 0
    a, b = weights(alone), weights(run_with_tasks)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert records(alone) == [r for r in records(run_with_tasks) if r["kind"] != "task"]
    assert records(alone, "samples.jsonl") == records(run_with_tasks, "samples.jsonl")


def test_rows_equal_what_evaluate_reports_for_the_checkpoint(
    run_with_tasks: Path, files: Path, capsys: Capture
) -> None:
    names = [f"{kind}.jsonl" for kind in RECORDS]
    found = rows(run_with_tasks)
    assert [(r["step"], r["task"]) for r in found] == [
        (step, name) for step in (4, 8, 12) for name in (*names, "sea.txt")
    ]
    for step in (4, 12):
        at = run_with_tasks / "checkpoints" / checkpoint_name(step)
        words = ["--task-file", *(str(files / name) for name in names), "--limit", "2"]
        capsys.readouterr()
        assert main(["evaluate", str(at), *words, "--device", "cpu", "--json"]) == 0
        evaluated = json.loads(capsys.readouterr().out)["tasks"]
        for row in (r for r in found if r["step"] == step and r["task"] != "sea.txt"):
            expected = evaluated[str(files / row["task"])]
            assert {k: row[k] for k in ("metric", "value", "stderr", "examples")} == {
                k: expected[k] for k in ("metric", "value", "stderr", "examples")
            }
    first, last = (r["value"] for r in found if r["task"] == "sea.txt" and r["step"] != 8)
    assert last < first  # bits per byte fall


def test_the_summary_has_the_last_rows_and_the_chance_level(run_with_tasks: Path) -> None:
    tasks = json.loads((run_with_tasks / "summary.json").read_text())["tasks"]
    assert [*tasks] == [f"{kind}.jsonl" for kind in RECORDS] + ["sea.txt"]
    last = {row["task"]: row for row in rows(run_with_tasks) if row["step"] == 12}
    assert all(tasks[name]["value"] == row["value"] for name, row in last.items())
    # Two examples of three choices; two of two contexts; pairs.
    assert tasks["choice.jsonl"]["chance"] == pytest.approx(1 / 3)
    assert (tasks["schema.jsonl"]["chance"], tasks["pair.jsonl"]["chance"]) == (0.5, 0.5)
    assert tasks["cloze.jsonl"]["chance"] is None
    # 2 passages of at most 2,000 characters, of 4,920.
    assert tasks["sea.txt"]["examples"] == 2
    assert tasks["sea.txt"]["stderr"] is not None


@pytest.mark.parametrize("stop_at", [4, 7])
def test_a_resumed_run_continues_evaluating_tasks(
    run_with_tasks: Path,
    corpus: Path,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    """A run that stops in a step with an evaluation evaluates first when it resumes."""
    run = tmp_path / "stopped"
    words = task_flags(files, "--evaluate.every", "4", "--evaluate.examples", "2")
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        assert main(["train", str(corpus), *TINY, *STEPS, *words, "--run", str(run)]) == 143
    assert {row["step"] for row in rows(run)} == ({4} if stop_at == 7 else set())
    assert main(["train", "--resume", "--run", str(run)]) == 0
    assert_same_run(run_with_tasks, run)


def test_in_loop_tasks_may_change_at_any_time(
    corpus: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert main(["train", str(corpus), *TINY, *STEPS, "--run", str(run)]) == 143
    # There were no in-loop tasks, so their interval is chosen now, and stays.
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


def test_invalid_tasks_are_rejected_before_the_run_directory_is_made(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("PRETRAIN_TASKS", raising=False)
    run, other = tmp_path / "run", write_task(tmp_path, RECORDS["pair"], "pair.jsonl")
    (tmp_path / "same_name").mkdir()
    same_name = write_task(tmp_path / "same_name", RECORDS["pair"], "pair.jsonl")
    write_task(tmp_path, RECORDS["choice"], "piqa.jsonl")
    (tmp_path / "none.jsonl").write_text("")
    packed = gzip.compress(random.Random(0).randbytes(4000).hex().encode())
    (tmp_path / "cut.txt.gz").write_bytes(packed[: len(packed) // 2])

    def rejection(*words: str) -> str:
        assert main(["train", str(corpus), *TINY, *STEPS, *words, "--run", str(run)]) == 2
        assert not run.exists()
        return capsys.readouterr().err

    assert "unknown task 'lambad'; did you mean 'lambada'?" in rejection(
        "--evaluate.tasks", "lambad"
    )
    assert "task piqa needs the file piqa.jsonl" in rejection("--evaluate.tasks", "piqa")
    here = ["--evaluate.task_data", str(tmp_path)]
    assert "is not the file of task piqa" in rejection("--evaluate.tasks", "piqa", *here)
    assert "contains no example" in rejection("--evaluate.task_files", str(tmp_path / "none.jsonl"))
    assert "missing.txt" in rejection("--evaluate.texts", str(tmp_path / "missing.txt"))
    cut = rejection("--evaluate.texts", str(tmp_path / "cut.txt.gz"))
    assert "only a part of the text would be scored" in cut
    assert "two in-loop tasks have the name pair.jsonl" in rejection(
        "--evaluate.task_files", f"{other},{same_name}"
    )
    assert "evaluate.examples is 0" in rejection("--evaluate.examples", "0")


@given(st.text(alphabet=" \n\tab\u00e9\u3000", max_size=3 * CHUNK_CHARACTERS))
def test_passages_joined_equal_the_text(text: str) -> None:
    found = list(chunks_of(text * 3))
    assert "".join(found) == text * 3
    assert all(0 < len(part) <= CHUNK_CHARACTERS for part in found)


def test_passages_end_at_word_boundaries() -> None:
    text = "word " * 1000
    assert [len(part) for part in chunks_of(text)] == [1999, 1995, 1006]
    assert all(not part.endswith("wor") for part in chunks_of(text))
    assert [len(part) for part in chunks_of("a" * 4500)] == [2000, 2000, 500]


def test_chance_is_the_mean_of_1_over_the_number_of_options() -> None:
    examples = (Example(("q",), ("a", "b")), Example(("q",), ("a", "b", "c", "d")))
    assert EvalTask(task_of_kind("choice", "mine"), examples).chance == 0.375


@pytest.mark.parametrize(
    ("evaluation_seconds", "every"),
    # 1,000 steps of 0.1 s leave 3 s: ten times 0.3 s, four times 0.75 s, once 2 s, never 5 s.
    [(0.01, 100), (0.3, 100), (0.4, 200), (0.75, 300), (1.5, 500), (2.0, 1000), (5.0, 1000)],
)
def test_evaluation_takes_at_most_3_percent_of_training(
    evaluation_seconds: float, every: int
) -> None:
    train = TrainConfig(steps=1000, evaluate_every=100)
    assert task_interval(train, Pace(0.1, evaluation_seconds)) == every
    times = -(-1000 // every)
    assert times * evaluation_seconds <= 0.03 * 100 + 1e-9 or every == 1000
