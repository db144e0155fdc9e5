"""One optimizer step: micro-batches in, gradients and an update out; no clock, console or file.

`training_steps` is the extension point of the library: a generator of updates that may be driven
with any source of batches. The loss is a sum of nats over targets, divided once by the number of
valid targets of the full step, so neither the micro-batch size nor the number of processes changes
what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.batches import MicroBatch
from pretrain.distributed import World
from pretrain.model.loss import LMLoss
from pretrain.optim.param_groups import gradient_values, set_learning_rate
from pretrain.parallel.model import ParallelModel


@dataclass(frozen=True, slots=True)
class Gradients:
    """What a forward and backward pass computed; the gradients themselves are on the parameters."""

    nats: float
    """sum of -log p over the step's targets, of all processes"""
    count: int
    """number of valid targets"""
    grad_norm: float
    """norm of the gradient of nats per target, before clipping"""

    @property
    def nats_per_token(self) -> float:
        """The loss; 0 for a batch without valid targets."""
        return self.nats / self.count if self.count else 0.0

    @property
    def are_usable(self) -> bool:
        """Whether an update may be made: there are targets, and everything is finite."""
        return self.count > 0 and math.isfinite(self.nats) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, slots=True)
class StepReport(Gradients):
    """What one step computed, before its update."""

    step: int
    """number of the step, from 0"""
    learning_rate: float
    updated: bool
    """False if the gradients were not usable: weights and optimizer are unchanged then"""


def compute_gradients(
    model: LMLoss | ParallelModel,
    micro_batches: Iterable[MicroBatch],
    *,
    clip: float,
    world: World,
    precision: str = "fp32",
) -> Gradients:
    """Leave the gradient of nats per target on the parameters, clipped to the norm `clip` (0: not
    clipped)."""
    model = as_parallel(model, world)
    model.zero_grad()
    if model.has_schedule:  # of pipeline stages, or of a deterministic reduction
        sums = model.run_schedule(micro_batches, precision)
    else:
        sums = forward_backward(model, micro_batches, precision)
    nats, count = model.reduce_step(*sums)
    gradients = gradient_values(parameter for _, parameter in model.named_parameters())
    torch._foreach_div_(gradients, max(1, count) / model.grad_divisor)
    grad_norm = model.clip(clip)
    return Gradients(nats, count, grad_norm)


def forward_backward(
    model: ParallelModel, micro_batches: Iterable[MicroBatch], precision: str
) -> tuple[Tensor, Tensor]:
    """Add up the gradients of all micro-batches of this process; returns nats and number of valid
    targets."""
    losses, counts = [], []
    for micro_batch, is_last in with_last(micro_batches):
        with model.reduce_gradients(now=is_last):
            loss, count = model.loss(micro_batch, precision)  # loss is a sum of nats
            loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        counts.append(count)
    return torch.stack(losses).sum(), torch.stack(counts).sum()


def with_last(micro_batches: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
    """Yield each micro-batch, and whether it is the last; the next one is read before."""
    iterator = iter(micro_batches)
    current = next(iterator)
    for following in iterator:
        yield current, False
        current = following
    yield current, True


def as_parallel(model: LMLoss | ParallelModel, world: World) -> ParallelModel:
    """Wrap a loss module that is not distributed."""
    return ParallelModel(model, world) if isinstance(model, LMLoss) else model


def train_step(
    model: LMLoss | ParallelModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[MicroBatch],
    *,
    step: int,
    lr: float,
    clip: float,
    world: World,
    precision: str = "fp32",
) -> StepReport:
    """Make one update from the micro-batches of a step.

    A loss or gradient that is not finite, or a batch without targets, leaves weights and optimizer
    unchanged, bit for bit.
    """
    set_learning_rate(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    gradients = compute_gradients(model, micro_batches, clip=clip, world=world, precision=precision)
    if gradients.are_usable:
        optimizer.step()
    return StepReport(
        nats=gradients.nats,
        count=gradients.count,
        grad_norm=gradients.grad_norm,
        step=step,
        learning_rate=lr,
        updated=gradients.are_usable,
    )


def training_steps(
    model: LMLoss | ParallelModel,
    optimizer: torch.optim.Optimizer,
    batch_at: Callable[[int], Iterable[MicroBatch]],
    *,
    lr_at: Callable[[int], float],
    steps: int,
    first_step: int = 0,
    clip: float = 0.0,
    world: World,
    precision: str = "fp32",
) -> Iterator[StepReport]:
    """Yield a report of each of the steps `first_step` to `steps` - 1, after its update.

    `batch_at(step)` returns the micro-batches of a step, `lr_at(step)` its learning rate.
    """
    model = as_parallel(model, world)
    model.lm_loss.train()
    for step in range(first_step, steps):
        yield train_step(
            model,
            optimizer,
            batch_at(step),
            step=step,
            lr=lr_at(step),
            clip=clip,
            world=world,
            precision=precision,
        )
