"""What a run works with, built from its settings: the model over all processes, its optimizer, its
batches.

A trial (`decide`) and a run build the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from pretrain.data import PreparedData
from pretrain.distributed import World
from pretrain.evaluate import byte_lengths
from pretrain.model import LMLoss, ModelConfig, build
from pretrain.optim import OptimizerConfig, build_optimizer
from pretrain.parallel import ParallelConfig, ParallelModel, parallelize
from pretrain.parallel.deterministic import ReductionTree
from pretrain.train.batches import TrainingBatches
from pretrain.train.config import TrainConfig

Given = ParamSpec("Given")
Result = TypeVar("Result")


def uncompiled(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function in which nothing is compiled, for what has other shapes than a step's: a compiler
    would take longer than it saves."""

    @wraps(function)
    def run(*given: Given.args, **named: Given.kwargs) -> Result:
        if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes long
            return function(*given, **named)
        with torch.compiler.set_stance("force_eager"):
            return function(*given, **named)

    return run


def build_model(
    data: PreparedData,
    model: ModelConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    world: World,
) -> ParallelModel:
    """The objective with its first weights, laid over the processes of `world`."""
    is_cut = parallel.shards_weights
    decoder = build(
        model,
        vocab_size=data.manifest.vocab_size,
        seed=None if is_cut else train.seed,
        device=torch.device("meta") if is_cut else world.device,
    )
    lm_loss = LMLoss(
        decoder, seed=train.seed, label_smoothing=train.label_smoothing, z_loss=train.z_loss
    )
    if train.compile == "on":
        # Where weights are gathered block by block, a graph cannot reach over several.
        lm_loss.compile_parts(by_block=is_cut)
    axes = parallel.resolve(world.size)
    laid_out = parallelize(lm_loss, axes, world, precision=train.precision)
    if is_cut:
        laid_out.initialize(train.seed)
    return laid_out


def build_updates(
    model: ParallelModel, optimizer: OptimizerConfig, train: TrainConfig
) -> torch.optim.Optimizer:
    """The optimizer of what this process holds."""
    assert train.batch_tokens is not None
    return build_optimizer(
        model.local_parameters(),
        config=optimizer,
        width=model.lm_loss.decoder.config.d_model,
        batch_tokens=train.batch_tokens,
        precision=train.precision,
        orthogonalizer=model.orthogonalizer,
    )


def training_batches(
    data: PreparedData,
    model: ModelConfig,
    train: TrainConfig,
    parallel: ParallelConfig | None = None,
    world: World | None = None,
) -> TrainingBatches:
    """The run's batches, from a config whose empty fields are filled; in a `world` only this
    process's rows of each."""
    assert train.batch_tokens is not None
    assert train.micro_batch_rows is not None
    rows = train.batch_tokens // model.window_tokens
    # A calibration does not know the steps yet; any order is as quick.
    known = {} if train.steps is None else {"steps": train.steps}
    order = data.order(
        context_length=model.window_tokens, seed=train.seed, batch_size=rows, **known
    )
    number, n = 0, 1
    if parallel is not None and world is not None:
        number, n = parallel.resolve(world.size).batch_shard(world.rank)
    is_elastic = parallel is not None and parallel.elastic
    return TrainingBatches(
        stream=data.split("train"),
        order=order,
        context_length=model.window_tokens,
        seed=train.seed,
        batch_size=rows,
        micro_batch_rows=train.micro_batch_rows,
        byte_lengths_V=byte_lengths(data.tokenizer()),
        own_rows=rows_of(
            number, n, rows, micro_batch_rows=train.micro_batch_rows if is_elastic else None
        ),
    )


def rows_of(rank: int, size: int, batch_size: int, *, micro_batch_rows: int | None) -> range:
    """The rows of a batch that one of `size` readers has, the first ones for the first. All
    have as many micro-batches, since each waits for the others at each; but where these are given,
    as the elastic order has it, branches of a tree over them."""
    if micro_batch_rows is None:
        each = -(-batch_size // size)
        return range(rank * each, (rank + 1) * each)
    n_leaves = -(-batch_size // micro_batch_rows)
    leaves = ReductionTree(size, n_leaves).leaves(rank)
    return range(leaves.start * micro_batch_rows, leaves.stop * micro_batch_rows)
