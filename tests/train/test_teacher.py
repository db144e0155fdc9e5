"""A run with train.teacher: what it learns from, what it reports, and that a resume is exact."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.runner.open import load_model
from runs import Killed, assert_same_run, kill_in_step, losses, train
from tiny import TINY

SETTINGS = [word for word in TINY if word not in ("--tokenizer.vocab_size", "400")]
SETTINGS += "--model.family gpt2 --model.dropout 0.1 --train.steps 8".split()
SETTINGS += "--train.save_every 4 --train.evaluate_every 4".split()


@pytest.fixture(scope="module")
def teacher(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix, whose tokenizer is that of its parts."""
    folder = tmp_path_factory.mktemp("teacher") / "mix"
    assert main(["mix", str(finished_run), str(finished_run), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def student(corpus: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("student") / "run"
    assert train(str(corpus), *SETTINGS, "--train.teacher", str(teacher), "--run", str(run)) == 0
    return run


def test_the_loss_is_that_of_the_text_and_the_updates_are_not(
    corpus: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    alone = [*SETTINGS, "--tokenizer.name", str(teacher / "tokenizer")]
    assert train(str(corpus), *alone, "--run", str(tmp_path / "alone")) == 0
    taught, untaught = losses(student), losses(tmp_path / "alone")
    assert taught[0] == untaught[0]  # of the same initial weights, before the first update
    assert taught[1:] != untaught[1:]
    first, second = (load_model(path).tokenizer.sha256 for path in (student, teacher))
    assert first == second


@pytest.mark.parametrize("step", [3, 6])
def test_a_killed_and_resumed_run_equals_one_that_was_not_killed(
    corpus: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    """Killed before the first checkpoint, and after it."""
    run = tmp_path / "run"
    words = [str(corpus), *SETTINGS, "--train.teacher", str(teacher), "--run", str(run)]
    with monkeypatch.context() as patch:
        kill_in_step(patch, step)
        with pytest.raises(Killed):
            train(*words)
    assert train("--resume", "--run", str(run)) == 0
    assert_same_run(student, run)


def test_a_resume_needs_the_same_teacher(
    corpus: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Path(shutil.copytree(finished_run, tmp_path / "teacher"))
    run, moved = tmp_path / "run", tmp_path / "moved"
    words = [str(corpus), *SETTINGS, "--train.teacher", str(teacher), "--run", str(run)]
    with pytest.MonkeyPatch.context() as patch:
        kill_in_step(patch, 6)
        with pytest.raises(Killed):
            train(*words)
    capsys.readouterr()
    teacher.rename(moved)
    resume = ["--resume", "--run", str(run)]
    assert train(*resume) == 2
    assert "train.teacher must be a run or a checkpoint (got " in capsys.readouterr().err

    checkpoint = next(iter(sorted((moved / "checkpoints").iterdir())))
    other = tmp_path / "other"
    mixed = ["mix", str(checkpoint), str(moved), "--out", str(other), "--weights", "2", "1"]
    assert main(mixed) == 0
    capsys.readouterr()
    here = ["--accept", "train.teacher", "--train.teacher"]
    assert train(*resume, *here, str(other)) == 2
    assert "(--accept teacher)" in capsys.readouterr().err
    assert train(*resume, *here, str(moved)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("--tokenizer.name bytes", "train.teacher must have the tokenizer of the text"),
        ("--model.context_length 64", "and a context of at least 64"),
        ("--train.teacher missing", "train.teacher must be a run or a checkpoint (got missing)"),
        ("--train.teacher_weight 1.5", "train.teacher_weight is 1.5; it must be"),
        *(
            (f"--parallel.{axis} 2 --parallel.processes 2", f"parallel.{axis} is 2; it must be 1")
            for axis in ("tensor", "context", "pipeline")
        ),
    ],
)
def test_what_does_not_fit_the_teacher_is_named(
    corpus: Path,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: str,
    message: str,
) -> None:
    run = tmp_path / "run"
    words = [str(corpus), *SETTINGS, "--train.teacher", str(teacher), *settings.split()]
    assert train(*words, "--run", str(run)) == 2
    assert message in capsys.readouterr().err
    assert not run.exists()


def test_several_processes_have_the_bits_of_one(
    corpus: Path, teacher: Path, tmp_path: Path
) -> None:
    words = [str(corpus), *SETTINGS, "--train.teacher", str(teacher), "--parallel.elastic", "true"]
    words += ["--train.micro_batch_rows", "2"]
    for n in (1, 2):
        run = tmp_path / str(n)
        assert train(*words, "--parallel.processes", str(n), "--run", str(run)) == 0
    assert losses(tmp_path / "1") == losses(tmp_path / "2")
