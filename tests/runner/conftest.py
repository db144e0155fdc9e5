"""Runs of 8 steps that the tests of resume, extend and anneal start from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.cli import main
from runs import stop_after
from tiny import TINY

SHORT = [
    *TINY,
    *"--model.family gpt2 --optimizer.name adamw --optimizer.learning_rate 3e-3".split(),
    *"--train.steps 8 --train.evaluate_every 4 --schedule.warmup_steps 2".split(),
]


@pytest.fixture(scope="session")
def short_settings() -> list[str]:
    """Settings of a run of 8 steps with the schedule wsd."""
    return SHORT


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 8 steps with the schedule wsd."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", str(corpus), *SHORT, "--run", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def constant_lr(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 8 steps with a constant learning rate and dropout."""
    run = tmp_path_factory.mktemp("constant") / "run"
    settings = [*SHORT, "--schedule.name", "constant", "--model.dropout", "0.1"]
    assert main(["train", str(corpus), *settings, "--run", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a signal stopped after 3 of its 8 steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert main(["train", str(corpus), *SHORT, "--run", str(run)]) == 143
    return run


@pytest.fixture
def copy_run(tmp_path: Path) -> Callable[..., Path]:
    """Copies a run to a folder of the test, by default `copy`."""

    def copy(run: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(run, tmp_path / name))

    return copy
