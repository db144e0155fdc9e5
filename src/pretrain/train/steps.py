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
from pretrain.distributed import World
from pretrain.model import LMLoss
from pretrain.optim.param_groups import gradient_values, set_learning_rate
from pretrain.parallel import ParallelModel


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
    updated: bool = True
    """whether the update was made; if not, weights and optimizer are as they were"""

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.count if self.count else 0.0


Accept = Callable[[int, float, float], bool]
"""Whether to make the update of a step, from its number, nats per target, and gradient norm."""


def train_step(
    lm_loss: LMLoss | ParallelModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[MicroBatch],
    *,
    step: int,
    rate: float,
    clip: float,
    world: World,
    precision: str = "fp32",
    accept: Accept | None = None,
) -> StepReport:
    """One update from some micro-batches.

    A loss or gradient that is not finite makes no update, nor does one that `accept` does not want
    or a batch without targets: weights and optimizer stay as they were, bit for bit.
    """
    model = ParallelModel(lm_loss, world) if isinstance(lm_loss, LMLoss) else lm_loss
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad(set_to_none=True)
    nats, count = model.backward(micro_batches, precision)
    values = gradient_values(parameter for _, parameter in model.named_parameters())
    torch._foreach_div_(values, max(1, count) / model.grad_divisor)
    norm = model.clip(clip)
    updated = count > 0 and math.isfinite(nats) and math.isfinite(norm)
    if accept is not None:
        updated = accept(step, nats / max(1, count), norm) and updated
    if updated:
        optimizer.step()
    return StepReport(step, nats, count, rate, norm, updated)


def training_steps(
    lm_loss: LMLoss | ParallelModel,
    optimizer: torch.optim.Optimizer,
    batch_at: Callable[[int], Iterable[MicroBatch]],
    *,
    lr_at: Callable[[int], float],
    steps: int,
    first_step: int = 0,
    clip: float = 0.0,
    world: World,
    precision: str = "fp32",
    accept: Accept | None = None,
) -> Iterator[StepReport]:
    """Updates `first_step` to `steps` - 1, each yielded once it is made.

    `batch_at(step)` gives the micro-batches of a step, `lr_at(step)` its learning rate.
    """
    model = ParallelModel(lm_loss, world) if isinstance(lm_loss, LMLoss) else lm_loss
    model.lm_loss.train()
    for step in range(first_step, steps):
        yield train_step(
            model,
            optimizer,
            batch_at(step),
            step=step,
            rate=lr_at(step),
            clip=clip,
            world=world,
            precision=precision,
            accept=accept,
        )
