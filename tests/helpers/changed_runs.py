"""A run that is resumed or extended with changes: commands, their errors, their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.cli import main
from runs import records


def resume(run: Path, *args: str) -> int:
    """Run `pretrain train --resume` and return its exit code."""
    return main(["train", "--resume", "--run", str(run), *args])


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that must fail with exit code 2, and return its message."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    return capsys.readouterr().err


def config_of(run: Path) -> dict[str, Any]:
    """Return the content of config.yaml."""
    content: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return content


def learning_rates(run: Path) -> list[float]:
    """Return the learning rate of each step."""
    return [line["learning_rate"] for line in records(run) if line["kind"] == "train"]


class Killed(BaseException):
    """The end of the process, which nothing in it can catch."""


def kill(*_: Any, **__: Any) -> Any:
    """Stand in for a function before which the process is killed."""
    raise Killed
