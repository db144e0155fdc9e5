"""Runs that are trained, stopped, killed, read and compared; a small model, and batches for it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.load import Checkpoint, list_checkpoints
from pretrain.cli import main
from pretrain.data.batches import MicroBatch
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import build
from pretrain.model.loss import LMLoss
from pretrain.parallel.model import ParallelModel
from pretrain.run.log import TIMES

DROPOUT = ["--model.dropout", "0.1", "--model.family", "gpt2"]


class Killed(BaseException):
    """Ends a run where a SIGKILL would: nothing is saved and nothing is cleaned up."""


def train(*args: str) -> int:
    """Run `pretrain train`; returns its exit code."""
    return main(["train", *args])


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's log, without times."""
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def losses(run: Path) -> list[float]:
    """The loss of each step."""
    return [record["loss"] for record in records(run) if record["kind"] == "train"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    checkpoint = Checkpoint(list_checkpoints(run / "checkpoints")[-1])
    names = [
        f"{group}/{name}" for group in ("model", "optimizer") for name in checkpoint.names(group)
    ]
    return {name: checkpoint.read(name) for name in names}


def assert_same_run(one: Path, other: Path) -> None:
    """Logs, samples and tensors of two runs are the same, bit for bit."""
    assert records(one) == records(other)
    assert records(one, "samples.jsonl") == records(other, "samples.jsonl")
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:5]}"


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Send SIGTERM to this process while step number `steps` runs."""
    _call_in_step(monkeypatch, steps, lambda: os.kill(os.getpid(), signal.SIGTERM))


def kill_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Raise Killed while step number `step` runs."""

    def die() -> None:
        raise Killed

    _call_in_step(monkeypatch, step, die)


def _call_in_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    n_steps, real = 0, ParallelModel.compute_gradients

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_steps
        n_steps += 1
        if n_steps == step:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(ParallelModel, "compute_gradients", counting)


def small_lm_loss(dropout: float = 0.0) -> LMLoss:
    """A loss module of width 16 for 50 token ids."""
    config = ModelConfig(d_model=16, n_heads=2, context_length=8, dropout=dropout)
    return LMLoss(build(config, vocab_size=50, seed=1), seed=1)


def batches(rows: int, micro: int, seed: int = 0) -> list[MicroBatch]:
    """Random ids as micro-batches of `micro` rows."""
    ids = torch.randint(0, 50, (rows, 9), generator=torch.Generator().manual_seed(seed))
    samples = torch.arange(rows)
    return [
        MicroBatch(ids[i : i + micro, :-1], ids[i : i + micro, 1:], samples[i : i + micro])
        for i in range(0, rows, micro)
    ]
