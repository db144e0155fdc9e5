"""What a run works with, built from its resolved config: the distributed model, its optimizer, its
batches.

A timed trial (`resolve`, `profile`) and a run build the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.load import Checkpoint
from pretrain.config import RunConfig, compose, read_file
from pretrain.data.batches import MicroBatch, micro_batch_at
from pretrain.data.format import PreparedData, TokenStream
from pretrain.data.order import MixtureOrder, Order, Rollback, batch_of_step, ceil_div
from pretrain.distributed import World
from pretrain.model.config import ModelConfig
from pretrain.model.counts import CountDecoder
from pretrain.model.decoder import Decoder, build
from pretrain.model.loss import LMLoss, Teacher
from pretrain.model.mixture import Mixture
from pretrain.optim.param_groups import build_optimizer
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.deterministic import ReductionTree
from pretrain.parallel.model import ParallelModel, parallelize
from pretrain.run.directory import CONFIG
from pretrain.train.config import filled
from pretrain.train.step import training_steps


def uncompiled() -> AbstractContextManager[Any]:
    """A context in which nothing is compiled: its batches have other shapes than a step's, and
    compiling for them takes longer than it saves."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import is slow
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


def build_model(
    config: RunConfig, data: PreparedData, world: World
) -> tuple[ParallelModel, torch.optim.Optimizer]:
    """The loss module with its initial weights, distributed over the processes of `world`, and the
    optimizer of the parameters that this process owns."""
    train = config.train
    is_sharded = config.parallel.shards_weights
    decoder = build(
        config.model,
        vocab_size=data.manifest.vocab_size,
        seed=None if is_sharded else train.seed,
        device=torch.device("meta") if is_sharded else world.device,
    )
    lm_loss = LMLoss(
        decoder, seed=train.seed, label_smoothing=train.label_smoothing, z_loss=train.z_loss
    )
    if train.teacher is not None:
        lm_loss.teacher = _load_teacher(config, data, world)
    if train.compile == "on":
        # Where weights are gathered block by block, a graph cannot span several blocks.
        lm_loss.compile_parts(by_block=is_sharded)
    axes = config.parallel.resolve(world.size)
    model = parallelize(lm_loss, axes, world, precision=train.precision)
    if is_sharded:
        model.initialize(train.seed)
    optimizer = build_optimizer(
        model.local_parameters(),
        config=config.optimizer,
        width=config.model.d_model,
        batch_tokens=filled(train.batch_tokens),
        precision=train.precision,
        orthogonalizer=model.orthogonalizer,
    )
    return model, optimizer


def _load_teacher(config: RunConfig, data: PreparedData, world: World) -> Teacher:
    checkpoint = Checkpoint(Path(config.train.teacher or ""))
    model = compose([read_file(checkpoint.path.parent.parent / CONFIG)]).model
    size = data.manifest.vocab_size
    decoder = load_decoder(checkpoint, model, vocab_size=size, world=world)
    return Teacher(decoder, config.train.teacher_weight)


def load_weights(model: ParallelModel, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model of the same shapes, of each the shard of this
    process."""
    model.reshard()
    with torch.no_grad():
        for name, shard in model.shards.items():
            shard.local.copy_(checkpoint.read(f"model/{name}", shard.bounds))


def load_decoder(
    checkpoint: Checkpoint, config: ModelConfig, *, vocab_size: int, world: World
) -> Decoder:
    """The decoder of a checkpoint, or the mixture of its parts, in evaluation mode."""
    new = partial(build, vocab_size=vocab_size, seed=None, device=world.device)
    parts = checkpoint.state.get("parts", ())
    decoders: list[Decoder] = []
    for part in parts:
        own = compose([{"model": part["model"]}]).model
        if sizes := part.get("sizes"):
            counts = CountDecoder(own, vocab_size=vocab_size, sizes=sizes)
            decoders.append(counts.to(world.device))
        else:
            decoders.append(new(own))
    decoder = Mixture(decoders, [part["weight"] for part in parts]) if parts else new(config)
    load_weights(ParallelModel(LMLoss(decoder), world), checkpoint)
    return decoder.eval()


@dataclass(slots=True)
class TrainingBatches:
    """The batch of each step: step s reads samples [s R, (s + 1) R) of R rows a batch, later ones
    after a rollback.

    It depends neither on the micro-batch size nor on the number of processes that share the rows.
    """

    stream: TokenStream
    order: Order | MixtureOrder
    batch_size: int
    micro_batch_rows: int
    byte_lengths_V: Tensor
    own_rows: range
    """the rows of each batch that this process reads; rows beyond the batch have no targets"""
    rollbacks: list[Rollback] = field(default_factory=list)
    n_bytes: int = 0
    """bytes of text behind the targets of the last batch, of this process"""
    checksum: int = 0
    """the sum of the CRC-32 of each window of the last batch, of this process"""

    def position(self, step: int) -> int:
        """The batch that a step reads, counted from the start of the data."""
        return batch_of_step(step, self.rollbacks)

    def at(self, step: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a step, all of one shape, as a compiled model needs them."""
        self.n_bytes = self.checksum = 0
        start = self.position(step) * self.batch_size
        first = start + self.own_rows.start
        stop = start + self.own_rows.stop
        end = min(stop, start + self.batch_size)
        rows = max(1, min(self.micro_batch_rows, stop - first))
        for sample in range(first, stop, rows):
            valid_rows = max(0, min(end - sample, rows))
            batch = micro_batch_at(
                self.stream, self.order, sample=sample, rows=rows, valid_rows=valid_rows
            )
            self.checksum += batch.checksum()
            self.n_bytes += int(self.byte_lengths_V[batch.targets[:valid_rows]].sum())
            yield batch

    def sources(self, steps: int) -> dict[str, dict[str, float]]:
        """Tokens, share and epochs of each source in the first `steps` steps; empty for one."""
        if isinstance(self.order, Order):
            return {}
        return self.order.sources(steps * self.batch_size)


def training_batches(
    config: RunConfig, data: PreparedData, world: World | None = None
) -> TrainingBatches:
    """The batches of a resolved config; with a `world` only the rows of this process."""
    train = config.train
    context = config.model.window_tokens
    rows, micro_batch_rows = filled(train.batch_tokens) // context, filled(train.micro_batch_rows)
    # A timed trial does not know the number of steps yet; its order may be any.
    known = {} if train.steps is None else {"steps": train.steps}
    own_rows = range(rows)
    if world is not None:
        axes = config.parallel.resolve(world.size)
        own_rows = rows_of(world.rank, axes, rows, micro_batch_rows=micro_batch_rows)
    return TrainingBatches(
        stream=data.split("train"),
        order=data.order(context_length=context, seed=train.seed, batch_size=rows, **known),
        batch_size=rows,
        micro_batch_rows=micro_batch_rows,
        byte_lengths_V=torch.from_numpy(data.tokenizer().byte_lengths),
        own_rows=own_rows,
    )


def rows_of(rank: int, axes: ParallelConfig, batch_size: int, *, micro_batch_rows: int) -> range:
    """The rows of a batch that a process reads; `axes` must be resolved.

    All readers have the same number of micro-batches, since each waits for the others at each one.
    For the deterministic reduction a reader has the micro-batches of its branches of the tree.
    """
    reader, n_readers = axes.batch_part(rank)
    if not axes.elastic:
        each = ceil_div(batch_size, n_readers)
        return range(reader * each, (reader + 1) * each)
    leaves = ReductionTree(n_readers, ceil_div(batch_size, micro_batch_rows)).leaves(reader)
    return range(leaves.start * micro_batch_rows, leaves.stop * micro_batch_rows)


def trial_steps(
    config: RunConfig,
    data: PreparedData,
    world: World,
    *,
    steps: int,
    read: Callable[[Iterable[MicroBatch]], Iterable[MicroBatch]] = iter,
) -> Iterator[float]:
    """Yield the seconds of each of the first steps of a run, with a tiny learning rate and a model
    that is thrown away. `read` wraps the micro-batches of each step."""
    batches = training_batches(config, data, world)
    model, optimizer = build_model(config, data, world)
    reports = training_steps(
        model,
        optimizer,
        lambda step: read(batches.at(step)),
        lr_at=lambda step: config.optimizer.learning_rate * 1e-3,
        steps=steps,
        clip=config.optimizer.clip,
        world=world,
        precision=config.train.precision,
    )
    start = time.perf_counter()
    for _ in reports:
        world.synchronize()
        yield time.perf_counter() - start
        start = time.perf_counter()
