"""The losses of a few steps of a small model with dropout on fixed random ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from pretrain.data.batches import MicroBatch
    from pretrain.distributed import World

STEPS = 8
_CONTEXT = 32
SIZES = {
    "family": "gpt2",
    "n_layers": 2,
    "n_heads": 2,
    "d_model": 64,
    "context_length": _CONTEXT,
    "dropout": 0.1,
}
_BATCH_ROWS = 16
_VOCAB_SIZE = 211
_SEED = 1


def losses(
    world: World,
    dtype: str,
    micro_batch_rows: int,
    *,
    compiled: bool = False,
    parallel: ParallelConfig | None = None,
) -> list[float]:
    """Train on all processes of `world`, and return the loss of each step in nats per token."""
    import torch

    from pretrain.config import compose
    from pretrain.model.decoder import build
    from pretrain.model.loss import LMLoss
    from pretrain.optim.config import OptimizerConfig
    from pretrain.optim.param_groups import build_optimizer
    from pretrain.parallel.model import parallelize
    from pretrain.train.build import rows_of
    from pretrain.train.step import training_steps

    axes = (parallel or ParallelConfig()).resolve(world.size)
    # Weights of shards are initialised when each process has its own.
    device = torch.device("meta") if axes.shard > 1 else world.device
    config = compose([{"model": SIZES}]).model
    decoder = build(config, vocab_size=_VOCAB_SIZE, seed=None, device=device)
    lm_loss = LMLoss(decoder.to(getattr(torch, dtype)), seed=_SEED)
    if compiled:
        lm_loss.compile_parts()
    model = parallelize(lm_loss, axes, world)
    model.initialize(_SEED)
    optimizer = build_optimizer(
        model.named_parameters(), config=OptimizerConfig(), orthogonalizer=model.orthogonalizer
    )
    own_rows = rows_of(world.rank, axes, _BATCH_ROWS, micro_batch_rows=micro_batch_rows)
    reports = training_steps(
        model,
        optimizer,
        lambda step: _batches(step, micro_batch_rows, own_rows),
        lr_at=lambda step: 3e-3,
        steps=STEPS,
        world=world,
    )
    return [report.nats_per_token for report in reports]


def _batches(step: int, micro_batch_rows: int, rows: range) -> list[MicroBatch]:
    """Return this process's rows of the batch of a step, in micro-batches."""
    import torch

    from pretrain.data.batches import IGNORE_INDEX, MicroBatch

    # Padding rows, where the processes do not divide the batch, have no valid targets.
    n_rows = max(_BATCH_ROWS, rows.stop)
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, _VOCAB_SIZE, (n_rows, _CONTEXT + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[_BATCH_ROWS:] = IGNORE_INDEX
    samples = _BATCH_ROWS * step + torch.arange(n_rows)
    batches = []
    for first in range(rows.start, rows.stop, micro_batch_rows):
        part = slice(first, min(first + micro_batch_rows, rows.stop))
        batches.append(MicroBatch(ids[part, :-1].contiguous(), targets[part], samples[part]))
    return batches


def max_difference(one: list[float], other: list[float]) -> float:
    """Return the largest difference of two loss curves, relative to the first."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))
