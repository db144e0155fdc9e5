"""Runs that are trained, stopped, read and compared; a small model, and batches for one step."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import list_checkpoints, open_checkpoint
from pretrain.cli import main
from pretrain.data import MicroBatch
from pretrain.model import LMLoss, ModelConfig, build
from pretrain.train.step import compute_gradients

DROPOUT = ["--model.dropout", "0.1", "--model.family", "gpt2"]


def train(*words: str) -> int:
    return main(["train", *words])


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's record, times aside."""
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    groups = {g: checkpoint.names(g) for g in ("model", "optimizer")}
    return {f"{g}/{n}": checkpoint.read(f"{g}/{n}") for g, names in groups.items() for n in names}


def assert_same_run(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    assert records(one, "samples.jsonl") == records(other, "samples.jsonl")
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Send ourselves SIGTERM while step number `steps` runs."""
    real = compute_gradients
    made = 0

    def counting(*args: Any, **keywords: Any) -> Any:
        nonlocal made
        made += 1
        if made == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **keywords)

    monkeypatch.setattr("pretrain.train.loop.compute_gradients", counting)


def small_objective(dropout: float = 0.0) -> LMLoss:
    chosen = ModelConfig(d_model=16, n_heads=2, context_length=8, dropout=dropout)
    return LMLoss(build(chosen, vocab_size=50, seed=1), seed=1)


def batches(rows: int, micro: int, seed: int = 0) -> list[MicroBatch]:
    ids = torch.randint(0, 50, (rows, 9), generator=torch.Generator().manual_seed(seed))
    samples = torch.arange(rows)
    return [
        MicroBatch(ids[i : i + micro, :-1], ids[i : i + micro, 1:], samples[i : i + micro])
        for i in range(0, rows, micro)
    ]
