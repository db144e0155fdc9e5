"""Batches -> better weights, one update at a time: the heart of the loop, without clock, screen or
file.

`training_steps` is the place to build upon: a generator that makes one update and yields a
StepReport, and that a user may drive with any source of batches. The objective is a sum of nats,
divided once by the number of targets that the whole step counted, so micro-batches and processes
never change what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from pretrain.data.batches import MicroBatch
from pretrain.model import Objective
from pretrain.optimizer.grouped import clip_gradients, gradient_values, set_learning_rate
from pretrain.world import World


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one update saw and did."""

    step: int
    """number of the update, from 0"""
    nats: float
    """sum of -log p over the step's targets, before the update"""
    count: int
    """how many targets were counted"""
    learning_rate: float
    grad_norm: float
    """norm of the whole gradient (of nats per target) before clipping"""

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.count


def train_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[MicroBatch],
    *,
    clip: float,
    world: World,
    precision: str = "fp32",
) -> tuple[float, int, float]:
    """One update from some micro-batches; returns (nats, count, gradient norm).

    A gradient that is not finite makes no update: weights and optimizer stay as they were, and the
    norm tells.
    """
    optimizer.zero_grad(set_to_none=True)
    all_nats, all_counts = [], []
    for batch in micro_batches:
        with world.autocast(precision):
            batch_nats, batch_count = objective(batch.to(world.device))
        batch_nats.backward()
        all_nats.append(batch_nats.detach())
        all_counts.append(batch_count)
    # Read once a step: a look at each micro-batch would make a GPU wait.
    nats, count = float(torch.stack(all_nats).sum()), int(torch.stack(all_counts).sum())
    parameters = list(objective.parameters())
    torch._foreach_div_(gradient_values(parameters), count)
    norm = clip_gradients(parameters, limit=clip)
    if math.isfinite(norm):
        optimizer.step()
    return nats, count, norm


def training_steps(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch_at: Callable[[int], Iterable[MicroBatch]],
    *,
    rate_at: Callable[[int], float],
    steps: int,
    first_step: int = 0,
    clip: float = 0.0,
    world: World,
    precision: str = "fp32",
) -> Iterator[StepReport]:
    """Updates `first_step` to `steps` - 1, each yielded once it is made.

    `batch_at(step)` gives the micro-batches of a step, `rate_at(step)` its learning rate.
    """
    objective.train()
    for step in range(first_step, steps):
        rate = rate_at(step)
        set_learning_rate(optimizer, rate)
        nats, count, norm = train_step(
            objective, optimizer, batch_at(step), clip=clip, world=world, precision=precision
        )
        yield StepReport(step, nats, count, rate, norm)
