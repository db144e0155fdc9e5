"""Runs on a clock that the test moves: each step takes as many seconds as a function says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.parallel.model import ParallelModel
from pretrain.train import clock, resolve
from pretrain.train.resolve import Pace
from tiny import TINY


class Machine:
    """A machine whose clock shows `seconds`, and on which a step takes step_seconds(seconds)."""

    def __init__(self, step_seconds: Callable[[float], float], *, start: float = 0.0) -> None:
        self.seconds, self.step_seconds = start, step_seconds
        self.n_steps = 0

    def install(self, patch: pytest.MonkeyPatch, *, measured: float = 1.0) -> None:
        """Let runs use this clock; the trial at the start measures `measured` seconds a step."""
        real = ParallelModel.compute_gradients

        def compute(*args: Any, **kwargs: Any) -> Any:
            self.n_steps += 1
            self.seconds += self.step_seconds(self.seconds)
            return real(*args, **kwargs)

        patch.setattr(clock, "now", lambda: self.seconds)
        patch.setattr(resolve, "measure_pace", lambda *args: Pace(measured))
        patch.setattr(resolve, "_evaluating_steps", lambda *args: 0.0)  # they take no time here
        patch.setattr(ParallelModel, "compute_gradients", compute)


# One network of a minute.
ALONE = "--train.minutes 1 --train.members 1 --train.counts 0".split()


def train(corpus: Path, run: Path, *settings: str) -> int:
    """Train for a minute of the machine's clock: 60 steps by the plan."""
    return main(["train", str(corpus), *TINY, *ALONE, "--run", str(run), *settings])


def decisions(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's clock.jsonl."""
    path = run / "clock.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def in_one_of_two_processes(corpus: str, run: str) -> None:
    """Train in this process of several; the clocks of ranks other than 0 are wrong."""
    import os

    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        Machine(lambda t: 1.0 if t < 20 else 3.0 if rank == 0 else 0.1).install(patch, measured=2.0)
        assert train(Path(corpus), Path(run), "--parallel.processes", "2") == 0
