"""`parallelize`: a loss module over the processes of a run, each with its own rows of a batch.

A `ParallelModel` has the loss module of this process and its shards of the weights. It computes
gradients of nats, summed over all processes, and leaves them on the parameters that this process
updates. In one process it adds nothing to the loss module.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pretrain.compat import flatten_mesh, join_meshes
from pretrain.distributed import World
from pretrain.model.decoder import initial_value
from pretrain.model.loss import LMLoss
from pretrain.optim.muon import Orthogonalizer
from pretrain.optim.param_groups import clip_gradients, gradient_values
from pretrain.parallel import deterministic
from pretrain.parallel.activation_checkpointing import apply_activation_checkpointing
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.context import InputSharding
from pretrain.parallel.replicated import average_sparse_grads_, replicate, sparse_tables
from pretrain.parallel.sharded import (
    LocalShard,
    ShardedOrthogonalizer,
    ShardLayout,
    ShardSlice,
    apply_fsdp,
    full_shard,
    local_shard,
    take_slice,
)

if TYPE_CHECKING:
    from pretrain.parallel.pipeline import PipelineLoss


def parallelize(
    lm_loss: LMLoss, axes: ParallelConfig, world: World, *, precision: str = "fp32"
) -> ParallelModel:
    """Distribute a loss module over the processes of `world`; `axes` must be resolved.

    The order is fixed: pipeline, tensor parallelism, activation checkpointing, FSDP; or, if no axis
    shards weights, activation checkpointing and data parallelism.

    Sharded modules come without memory (device meta), so that no process ever stores all weights,
    and are given memory here. Their values must be set afterwards: by `ParallelModel.initialize`,
    or from a checkpoint.
    """
    if not axes.shards_weights:
        apply_activation_checkpointing(lm_loss.decoder, axes.activation_checkpointing)
        model = ParallelModel(lm_loss, world, is_deterministic=axes.elastic)
        if world.size > 1 and not axes.elastic:
            model.replicas = replicate(lm_loss, world)
            model.sparse_tables = list(sparse_tables(lm_loss.decoder).values())
        return model

    mesh = build_mesh(axes, world)
    pipeline = None
    if axes.pipeline > 1:
        from pretrain.parallel.pipeline import PipelineLoss

        lm_loss = pipeline = PipelineLoss(lm_loss, mesh["pp"].get_group())
    decoder = lm_loss.decoder
    if axes.tensor > 1:
        from pretrain.parallel.tensor import apply_tensor_parallel, full_logits

        apply_tensor_parallel(lm_loss, mesh["tp"])
        if pipeline is None:
            decoder.logits = partial(full_logits, decoder)  # type: ignore[method-assign]
    apply_activation_checkpointing(decoder, axes.activation_checkpointing)
    uses_fsdp = axes.data * axes.shard * axes.context > 1  # type: ignore[operator]
    if uses_fsdp:
        shards = flatten_mesh(mesh["dp_shard", "cp"])
        replicas = mesh["dp_replicate"]
        fsdp_mesh = shards if replicas.size() == 1 else join_meshes(replicas, shards)
        apply_fsdp(decoder, fsdp_mesh, precision=precision)
    lm_loss.to_empty(device=world.device)
    return ParallelModel(
        lm_loss,
        world,
        mesh=mesh,
        inputs=InputSharding(decoder, mesh),
        pipeline=pipeline,
        uses_fsdp=uses_fsdp,
        compute_dtype=precision,
    )


def build_mesh(axes: ParallelConfig, world: World) -> DeviceMesh:
    """The ranks by axis, outermost first: the ranks that communicate most are neighbours."""
    assert axes.data is not None
    sizes = {
        "pp": axes.pipeline,
        "dp_replicate": axes.data,
        "dp_shard": axes.shard,
        "cp": axes.context,
        "tp": axes.tensor,
    }
    return init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


@dataclass(slots=True)
class ParallelModel:
    """A loss module, and this process's shards of its weights."""

    lm_loss: LMLoss
    world: World
    is_deterministic: bool = False
    """whether gradients are reduced in an order that does not depend on the number of processes"""

    # Data parallelism without sharded weights.
    replicas: DistributedDataParallel | None = None
    sparse_tables: list[nn.Parameter] = field(default_factory=list)
    """tables whose gradients are sparse, which DistributedDataParallel does not reduce"""

    # Sharded weights.
    mesh: DeviceMesh | None = None
    inputs: InputSharding | None = None
    pipeline: PipelineLoss | None = None
    """the loss module, if this process has some layers only"""
    uses_fsdp: bool = False
    compute_dtype: str = "fp32"
    """precision of the weights in forward and backward: bf16 if FSDP gathers them so"""

    shards: dict[str, LocalShard] = field(init=False)
    """by the decoder's parameter names"""
    layout: ShardLayout | None = field(init=False, default=None)
    """which rank stores what; None if every rank stores everything"""
    forward_seconds: float = 0.0
    """of this process in the last step"""

    def __post_init__(self) -> None:
        named = self.lm_loss.decoder.named_parameters()
        # `local_shard` imports DTensor, which takes half a second that one process can save.
        shard_of = full_shard if self.mesh is None else local_shard
        self.shards = {name: shard_of(parameter) for name, parameter in named}
        if self.mesh is not None:
            self.layout = ShardLayout(self.shards, self.world)

    def _axis(self, name: str) -> tuple[int, int]:
        """This rank's index on an axis of the mesh, and the size of the axis."""
        if self.mesh is None:
            return 0, 1
        return self.mesh[name].get_local_rank(), self.mesh[name].size()

    # --- parameters -----------------------------------------------------------------------------

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The local parameters that this process updates, by name; empty ones are left out."""
        return [(name, p) for name, p in self.local_parameters() if p.numel()]

    def local_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The same with empty ones: an optimizer of full matrices exchanges data for them too."""
        return [(name, shard.local) for name, shard in self.shards.items()]

    @property
    def orthogonalizer(self) -> Orthogonalizer:
        """For an optimizer whose update rule needs full matrices."""
        if self.mesh is None or self.layout is None:
            return Orthogonalizer()
        group = flatten_mesh(self.mesh["dp_shard", "cp", "tp"]).get_group()
        return ShardedOrthogonalizer(self.shards, self.layout, group)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set the initial weights, each shard as a function of the seed and its position."""
        decoder = self.lm_loss.decoder
        for name, shard in self.shards.items():
            # All columns of the shard's rows: an element is drawn by its index in the parameter.
            start, stop = shard.bounds[0] if shard.bounds else (0, 1)
            n_columns = math.prod(shard.shape[1:])
            values = initial_value(
                decoder.config,
                name,
                shard.shape,
                start * n_columns,
                stop * n_columns,
                seed=seed,
                device=self.world.device,
            ).view(stop - start, *shard.shape[1:])
            shard.local.copy_(take_slice(values, ((0, stop - start), *shard.bounds[1:])))

    def shard_of(self, name: str, n_dims: int) -> tuple[tuple[int, ...], ShardSlice] | None:
        """The full shape of a parameter, or of an optimizer state of its first `n_dims` dimensions,
        and this rank's slice; None if this rank stores all of it."""
        shard = self.shards[name]
        if shard.local is shard.parameter or not n_dims:
            return None
        return tuple(shard.shape[:n_dims]), shard.bounds[:n_dims]

    def is_saver(self, name: str, *, is_full: bool = False) -> bool:
        """Whether this rank saves its shard of a parameter, or (`is_full`) a state that all owners
        of the parameter have in full, as a count of steps."""
        if self.layout is None:
            return self.world.is_main
        return self.layout.is_first_owner(name, of_any_slice=is_full)

    def unshard(self) -> None:
        """Gather the weights that are used outside of the decoder's forward: embedding and head."""
        if self.uses_fsdp:
            self.lm_loss.decoder.unshard()  # type: ignore[operator]

    def reshard(self) -> None:
        """Free gathered weights, which FSDP keeps after an evaluation. Until then new weights are
        not read, and gradients not reset."""
        if self.uses_fsdp:
            self.lm_loss.decoder.reshard()  # type: ignore[operator]

    # --- what this rank evaluates ---------------------------------------------------------------

    @property
    def _model_parallel_size(self) -> int:
        """Ranks that compute the same rows together: those of the tp and pp axes."""
        return self._axis("tp")[1] * self._axis("pp")[1]

    @property
    def eval_shard(self) -> tuple[int, int]:
        """The part of a text that this process evaluates, and the number of parts. Ranks of one tp
        or pp axis have the same part."""
        n = self.world.size // self._model_parallel_size
        return self.world.rank // self._axis("tp")[1] % n, n

    @property
    def owns_loss(self) -> bool:
        """Whether this rank's losses are added up, of those that evaluate the same part."""
        tp_rank, _ = self._axis("tp")
        pp_rank, n_stages = self._axis("pp")
        return tp_rank == 0 and pp_rank == n_stages - 1

    # --- a training step ------------------------------------------------------------------------

    @property
    def grad_divisor(self) -> int:
        """The number of sums of which `reduce_step` leaves the mean."""
        return 1 if self.is_deterministic else self.world.size // self._model_parallel_size

    def zero_grad(self) -> None:
        """Remove the gradients of the last step."""
        self.reshard()
        self.lm_loss.zero_grad(set_to_none=True)
        for shard in self.shards.values():
            shard.local.grad = None
        self.forward_seconds = 0.0

    def loss(self, micro_batch: Any, precision: str) -> tuple[Tensor, Tensor]:
        """Nats and number of valid targets of this rank's part of a micro-batch."""
        start = time.perf_counter()
        module = self.lm_loss if self.replicas is None else self.replicas
        with self.world.autocast(precision):
            micro_batch = micro_batch.to(self.world.device)
            if self.inputs is None:
                loss, n_targets = module(micro_batch)
            else:
                with self.inputs.local_chunk(micro_batch) as chunk:
                    loss, n_targets = module(chunk)
        self.forward_seconds += time.perf_counter() - start
        return loss, n_targets

    def reduce_gradients(self, *, now: bool) -> AbstractContextManager[Any]:
        """Reduce gradients over replicas in this backward pass, or later: once a step is enough."""
        if self.replicas is not None and not now:
            return self.replicas.no_sync()
        if self.uses_fsdp and self._axis("dp_replicate")[1] > 1:
            self.lm_loss.decoder.set_requires_all_reduce(now)  # type: ignore[operator]
        return nullcontext()

    @property
    def has_schedule(self) -> bool:
        """Whether `run_schedule` must run the micro-batches of a step, in an order of its own."""
        return self.is_deterministic or self.pipeline is not None

    def run_schedule(self, micro_batches: Iterable[Any], precision: str) -> tuple[Tensor, Tensor]:
        """Forward and backward of all micro-batches, in the order of a pipeline or of the
        deterministic reduction."""
        if self.pipeline is not None:
            return self.pipeline.forward_backward(list(micro_batches), self.world, precision)
        nats, n_targets, self.forward_seconds = deterministic.forward_backward(
            self.lm_loss, micro_batches, self.world, precision
        )
        return nats, n_targets

    def reduce_step(self, nats: Tensor, n_targets: Tensor) -> tuple[float, int]:
        """Complete the gradients of a step, summed over processes and divided by `grad_divisor`.

        `nats` and `n_targets` are this rank's sums; returns those of all processes.
        """
        if self.is_deterministic:  # everything is reduced already
            return float(nats), int(n_targets)
        for shard in self.shards.values():
            shard.localize_grad()
        if self.pipeline is not None and self.lm_loss.decoder.config.tied_head:
            self.pipeline.sum_tied_grads(self.shards)
        average_sparse_grads_(self.sparse_tables, self.world.size)

        # Read once a step: to read them after each micro-batch would make a GPU wait.
        if self.world.size > 1:
            both = torch.stack([nats.double(), n_targets.double()])
            nats, n_targets = self.world.all_reduce_(both)
        # The ranks of a tp axis all have the loss; of a pp axis only the last.
        n_copies = self._axis("tp")[1]
        return float(nats) / n_copies, int(n_targets) // n_copies

    def clip(self, max_norm: float) -> float:
        """Scale the gradients to a joint norm of at most `max_norm` (0: no limit); returns the norm
        before."""
        if self.layout is None:
            return clip_gradients((p for _, p in self.named_parameters()), max_norm=max_norm)
        norm = math.sqrt(sum(self._squared_norms().values()))
        if max_norm and math.isfinite(norm) and norm > max_norm:
            for values in gradient_values(p for _, p in self.named_parameters()):
                values.mul_(max_norm / norm)
        return norm

    def gradient_norms(self) -> dict[str, float]:
        """The norm of each full parameter's gradient. All processes must call this."""
        return {name: math.sqrt(square) for name, square in self._squared_norms().items()}

    def _squared_norms(self) -> dict[str, float]:
        norms = {
            name: torch.linalg.vector_norm(values, dtype=torch.float64)
            for name, shard in self.shards.items()
            for values in gradient_values([shard.local])
        }
        # Read at once: each read makes a GPU wait.
        squares = torch.stack(list(norms.values())).square().tolist() if norms else []
        own = dict.fromkeys(self.shards, 0.0) | dict(zip(norms, squares, strict=True))
        if self.layout is None:
            return own
        shares = {name: square / len(self.layout.owners(name)) for name, square in own.items()}
        names = self.layout.names
        totals = self.world.all_sum(*(shares.get(name, 0.0) for name in names))
        return dict(zip(names, totals, strict=True))
