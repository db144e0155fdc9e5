"""One optimizer step: micro-batches in, gradients and an update out; no clock, console or file.

`compute_gradients` is what the loop of a run calls. `training_steps` is the extension point of the
library: a generator of updates that may be driven with any source of batches. The loss is a sum of
nats over targets, divided once by the number of valid targets of the full step, so neither the
micro-batch size nor the number of processes changes what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from pretrain.data.batches import MicroBatch
from pretrain.distributed import World
from pretrain.model.loss import LMLoss
from pretrain.optim.param_groups import gradient_values, set_learning_rate
from pretrain.parallel.model import ParallelModel


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the passes of one step computed; the gradients themselves are on the parameters."""

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
    def is_usable(self) -> bool:
        """Whether an update may be made: there are targets, and everything is finite."""
        return self.count > 0 and math.isfinite(self.nats) and math.isfinite(self.grad_norm)


def compute_gradients(
    model: ParallelModel,
    micro_batches: Iterable[MicroBatch],
    *,
    clip: float,
    precision: str = "fp32",
) -> StepReport:
    """Leave the gradient of nats per target on the parameters, clipped to the norm `clip` (0: not
    clipped)."""
    model.zero_grad()
    if model.orders_micro_batches:  # of pipeline stages, or of a deterministic reduction
        nats, count = model.ordered_forward_backward(micro_batches, precision)
    else:
        sums, counts = [], []
        batches = iter(micro_batches)
        following = next(batches, None)
        while (micro_batch := following) is not None:
            following = next(batches, None)
            with model.reduce_gradients(now=following is None):
                nats, n_targets = model.nats(micro_batch, precision)
                nats.backward()  # type: ignore[no-untyped-call]
            sums.append(nats.detach())
            counts.append(n_targets)
        nats, count = torch.stack(sums).sum(), torch.stack(counts).sum()
    all_nats, n_valid = model.finish_gradients(nats, count)
    gradients = gradient_values(parameter for _, parameter in model.named_parameters())
    torch._foreach_div_(gradients, max(1, n_valid) / model.n_averaged)
    return StepReport(all_nats, n_valid, grad_norm=model.clip(clip))


def training_steps(
    model: LMLoss | ParallelModel,
    optimizer: torch.optim.Optimizer,
    batch_at: Callable[[int], Iterable[MicroBatch]],
    *,
    lr_at: Callable[[int], float],
    steps: int,
    clip: float = 0.0,
    world: World,
    precision: str = "fp32",
) -> Iterator[StepReport]:
    """Yield a report of each of the steps 0 to `steps` - 1, after its update.

    `batch_at(step)` returns the micro-batches of a step, `lr_at(step)` its learning rate. A loss or
    gradient that is not finite, or a batch without targets, leaves weights and optimizer unchanged,
    bit for bit.
    """
    if isinstance(model, LMLoss):
        model = ParallelModel(model, world)
    model.lm_loss.train()
    for step in range(steps):
        report = compute_gradients(model, batch_at(step), clip=clip, precision=precision)
        if report.is_usable:
            set_learning_rate(optimizer, lr_at(step))
            optimizer.step()
        yield report
