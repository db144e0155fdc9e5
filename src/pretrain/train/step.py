"""Optimizer steps: micro-batches in, updates out; no clock, console or file.

`ParallelModel.compute_gradients` is what the loop of a run calls. `training_steps` is the extension
point of the library: a generator of updates that may be driven with any source of batches. The loss
is a sum of nats over targets, divided once by the number of valid targets of the full step, so
neither the micro-batch size nor the number of processes changes what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from pretrain.data.batches import MicroBatch
from pretrain.distributed import World
from pretrain.machine import keep_freed_memory
from pretrain.model.loss import LMLoss
from pretrain.optim.param_groups import set_learning_rate
from pretrain.parallel.model import ParallelModel, StepReport


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
    keep_freed_memory()
    for step in range(steps):
        report = model.compute_gradients(batch_at(step), clip=clip, precision=precision)
        if report.is_usable:
            set_learning_rate(optimizer, lr_at(step))
            optimizer.step()
        yield report
