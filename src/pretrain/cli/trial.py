"""A small model with dropout on fixed random text, which checks of a machine train a little."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.parallel.config import ParallelConfig

if TYPE_CHECKING:
    import torch

    from pretrain.data import MicroBatch
    from pretrain.distributed import World
    from pretrain.model import ModelConfig

STEPS, _ROWS, _IDS, _SEED = 8, 16, 211, 1


def losses(
    world: World,
    dtype: torch.dtype,
    rows: int,
    *,
    compiled: bool = False,
    parallel: ParallelConfig | None = None,
) -> list[float]:
    """Losses of some steps by micro-batches of `rows`, on all processes of `world`."""
    import torch

    from pretrain.model import LMLoss, ModelConfig, build
    from pretrain.model.config import model_defaults
    from pretrain.optim import OptimizerConfig, build_optimizer
    from pretrain.parallel import parallelize
    from pretrain.train import training_steps
    from pretrain.train.build import rows_of

    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 64, "context_length": 32, "dropout": 0.1}
    config = ModelConfig(**{**model_defaults({"family": "gpt2"}), **sizes})
    layout = (parallel or ParallelConfig()).resolve(world.size)
    is_cut = layout.shard > 1
    place, seed = (torch.device("meta"), None) if is_cut else (world.device, _SEED)
    decoder = build(config, vocab_size=_IDS, seed=seed, device=place).to(dtype)
    lm_loss = LMLoss(decoder, seed=_SEED)
    if compiled:
        lm_loss.compile_parts()
    model = parallelize(lm_loss, layout, world)
    if is_cut:
        model.initialize(_SEED)
    own = rows_of(world.rank, world.size, _ROWS, micro_batch_rows=rows if layout.elastic else None)
    reports = training_steps(
        model,
        build_optimizer(
            model.named_parameters(), config=OptimizerConfig(), orthogonalizer=model.orthogonalizer
        ),
        lambda step: _batches(config, step, rows, own),
        lr_at=lambda step: 3e-3,
        steps=STEPS,
        world=world,
    )
    return [report.nats_per_token for report in reports]


def _batches(config: ModelConfig, step: int, rows: int, own: range) -> list[MicroBatch]:
    import torch

    from pretrain.data import MicroBatch
    from pretrain.data.batches import IGNORE_INDEX

    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, _IDS, (_ROWS, config.window_tokens + 1), generator=generator)
    # Rows beyond the batch, where processes do not divide it, weigh nothing.
    ids = torch.cat([ids, torch.zeros(max(0, own.stop - _ROWS), ids.shape[1], dtype=ids.dtype)])
    targets = ids[:, 1:].clone()
    targets[_ROWS:] = IGNORE_INDEX
    samples = _ROWS * step + torch.arange(len(ids))
    parts = [range(i, min(i + rows, own.stop)) for i in range(own.start, own.stop, rows)]
    return [
        MicroBatch(
            ids[p.start : p.stop, :-1].contiguous(),
            targets[p.start : p.stop],
            samples[p.start : p.stop],
        )
        for p in parts
    ]


def furthest(one: list[float], other: list[float]) -> float:
    """The largest difference of two curves, relative to the first."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))
