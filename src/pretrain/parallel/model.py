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
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pretrain.compat import (
    ddp_ignore_parameters,
    flatten_mesh,
    join_meshes,
    matmul_and_attention_ops,
)
from pretrain.distributed import World
from pretrain.model.decoder import Decoder, initial_rows
from pretrain.model.loss import LMLoss
from pretrain.optim.muon import Orthogonalizer
from pretrain.optim.param_groups import clip_gradients, gradient_values
from pretrain.parallel import deterministic
from pretrain.parallel.config import ActivationCheckpointing, ParallelConfig
from pretrain.parallel.context import InputSharding
from pretrain.parallel.sharded import (
    LocalShard,
    ShardedOrthogonalizer,
    ShardSlice,
    apply_fsdp,
    gather_slices,
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
        replicas = None
        if world.size > 1 and not axes.elastic:
            # Backward averages dense gradients while it runs: "PyTorch Distributed" (Li et al.,
            # 2020). Initial weights are a function of the seed, the same on all ranks.
            tables = sparse_tables(lm_loss.decoder)
            ddp_ignore_parameters(lm_loss, [f"decoder.{name}" for name in tables])
            device_ids = [world.device] if world.device.type == "cuda" else None
            replicas = DistributedDataParallel(
                lm_loss, device_ids=device_ids, init_sync=False, gradient_as_bucket_view=True
            )
        return ParallelModel(lm_loss, world, axes, replicas=replicas)

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
    if axes.uses_fsdp:
        shards = flatten_mesh(mesh["dp_shard", "cp"])
        fsdp_mesh = shards if axes.data == 1 else join_meshes(mesh["dp_replicate"], shards)
        apply_fsdp(decoder, fsdp_mesh, precision=precision)
    lm_loss.to_empty(device=world.device)
    return ParallelModel(
        lm_loss,
        world,
        axes,
        mesh=mesh,
        inputs=InputSharding(decoder, mesh),
        pipeline=pipeline,
        compute_dtype=precision,
    )


def sparse_tables(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Embedding tables with sparse gradients, by their names in the decoder."""
    ngrams = decoder.ngrams
    if ngrams is None or not ngrams.sparse_gradients:
        return {}
    return {f"ngrams.{name}": table for name, table in ngrams.named_parameters()}


def apply_activation_checkpointing(decoder: Decoder, kind: ActivationCheckpointing) -> None:
    """Recompute the activations of each block in backward, instead of storing them.

    A block stores its inputs only (`full`), or its inputs and the results of matmuls and attention,
    which take longest to recompute (`selective`): "Training Deep Nets with Sublinear Memory Cost"
    (Chen et al., 2016), by torch's checkpoint. Dropout masks are a function of their position, so
    they are the same in both computations.
    """
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        ops = matmul_and_attention_ops()
        options["context_fn"] = partial(create_selective_checkpoint_contexts, ops)
    for block in decoder.blocks.values():
        block.forward = partial(checkpoint, block.forward, **options)


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


@dataclass(slots=True)
class ParallelModel:
    """A loss module, and this process's shards of its weights."""

    lm_loss: LMLoss
    world: World
    axes: ParallelConfig = field(default_factory=partial(ParallelConfig, data=1))

    replicas: DistributedDataParallel | None = None
    """data parallelism without sharded weights"""

    # Sharded weights.
    mesh: DeviceMesh | None = None
    inputs: InputSharding | None = None
    pipeline: PipelineLoss | None = None
    """the loss module, if this process has some layers only"""
    compute_dtype: str = "fp32"
    """precision of the weights in forward and backward: bf16 if FSDP gathers them so"""

    shards: dict[str, LocalShard] = field(init=False)
    """by the decoder's parameter names"""
    slices: list[dict[str, ShardSlice]] = field(init=False, default_factory=list)
    """what each rank stores; empty if every rank stores everything"""
    forward_seconds: float = 0.0
    """of this process in the last step"""

    def __post_init__(self) -> None:
        named = self.lm_loss.decoder.named_parameters()
        self.shards = {name: local_shard(parameter) for name, parameter in named}
        if self.mesh is not None:
            self.slices = gather_slices(self.shards, self.world)

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
        if self.mesh is None:
            return Orthogonalizer()
        group = flatten_mesh(self.mesh["dp_shard", "cp", "tp"]).get_group()
        return ShardedOrthogonalizer(self.shards, self.slices, group)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set the initial weights, each shard as a function of the seed and its position."""
        for name, shard in self.shards.items():
            start, stop = shard.bounds[0]
            values = initial_rows(
                self.lm_loss.decoder.config,
                name,
                shard.shape,
                rows=(start, stop),
                seed=seed,
                device=self.world.device,
            )
            shard.local.copy_(take_slice(values, ((0, stop - start), *shard.bounds[1:])))

    def shard_of(self, name: str, n_dims: int) -> tuple[tuple[int, ...], ShardSlice] | None:
        """The full shape of a parameter, or of an optimizer state of its first `n_dims` dimensions,
        and this rank's slice; None if this rank stores all of it."""
        shard = self.shards[name]
        if shard.local is shard.parameter or not n_dims:
            return None
        return tuple(shard.shape[:n_dims]), shard.bounds[:n_dims]

    def is_saved_here(self, name: str, *, is_full: bool = False) -> bool:
        """Whether this rank saves its shard of a parameter, or (`is_full`) a state that all owners
        of the parameter have in full, as a count of steps."""
        if not self.slices:
            return self.world.is_main
        return self._owners(name, of_any_slice=is_full)[0] == self.world.rank

    def _owners(self, name: str, *, of_any_slice: bool = False) -> list[int]:
        """The ranks that store the same slice of a parameter as this one, or any slice of it."""
        own = self.shards[name].bounds
        return [
            rank
            for rank, slices in enumerate(self.slices)
            if name in slices and (of_any_slice or slices[name] == own)
        ]

    def unshard(self) -> None:
        """Gather the weights that are used outside of the decoder's forward: embedding and head."""
        if self.axes.uses_fsdp:
            self.lm_loss.decoder.unshard()  # type: ignore[operator]

    def reshard(self) -> None:
        """Free gathered weights, which FSDP keeps after an evaluation. Until then new weights are
        not read, and gradients not reset."""
        if self.axes.uses_fsdp:
            self.lm_loss.decoder.reshard()  # type: ignore[operator]

    # --- a training step ------------------------------------------------------------------------

    def compute_gradients(
        self, micro_batches: Iterable[Any], *, clip: float, precision: str = "fp32"
    ) -> StepReport:
        """Leave the gradient of nats per target of a step on the parameters, clipped to the norm
        `clip` (0: not clipped)."""
        axes = self.axes
        self.reshard()
        self.lm_loss.zero_grad(set_to_none=True)
        for shard in self.shards.values():
            shard.local.grad = None
        self.forward_seconds = 0.0
        if self.pipeline is not None:
            own = list(micro_batches)
            nats, n_targets = self.pipeline.forward_backward(own, self.world, precision)
        elif axes.elastic:
            own, forward = list(micro_batches), partial(self.nats, precision=precision)
            nats, n_targets = deterministic.forward_backward(self.lm_loss, own, self.world, forward)
            # Per micro-batch: a process that has more of them than another is not slower.
            self.forward_seconds /= max(1, len(own))
        else:
            sums, counts = [], []
            batches = iter(micro_batches)
            following = next(batches, None)
            while (micro_batch := following) is not None:
                following = next(batches, None)
                with self._reduction(now=following is None):
                    nats, n_targets = self.nats(micro_batch, precision)
                    nats.backward()  # type: ignore[no-untyped-call]
                sums.append(nats.detach())
                counts.append(n_targets)
            nats, n_targets = torch.stack(sums).sum(), torch.stack(counts).sum()
        if axes.elastic:  # everything is reduced already
            all_nats, count = float(nats), int(n_targets)
        else:
            all_nats, count = self._reduce(nats, n_targets)

        # The number of sums of which the reductions leave the mean.
        n_averaged = 1 if axes.elastic else self.world.size // (axes.tensor * axes.pipeline)
        parameters = [parameter for _, parameter in self.named_parameters()]
        torch._foreach_div_(gradient_values(parameters), max(1, count) / n_averaged)
        norm = math.sqrt(sum(self._squared_norms().values())) if self.slices else None
        norm = clip_gradients(parameters, max_norm=clip, norm=norm)
        return StepReport(all_nats, count, grad_norm=norm)

    def nats(self, micro_batch: Any, precision: str) -> tuple[Tensor, Tensor]:
        """Nats and number of valid targets of this rank's part of a micro-batch."""
        start = time.perf_counter()
        module = self.lm_loss if self.replicas is None else self.replicas
        batch = micro_batch.to(self.world.device)
        own_chunk = nullcontext(batch) if self.inputs is None else self.inputs.local_chunk(batch)
        with self.world.autocast(precision), own_chunk as batch:
            nats, n_targets = module(batch)
        self.forward_seconds += time.perf_counter() - start
        return nats, n_targets

    def _reduction(self, *, now: bool) -> AbstractContextManager[Any]:
        """Reduce gradients over replicas in this backward pass, or later: once a step is enough."""
        if self.replicas is not None and not now:
            return self.replicas.no_sync()
        if self.axes.uses_fsdp and self.axes.data != 1:
            self.lm_loss.decoder.set_requires_all_reduce(now)  # type: ignore[operator]
        return nullcontext()

    def _reduce(self, nats: Tensor, n_targets: Tensor) -> tuple[float, int]:
        """Complete the gradients of a step, and sum nats and targets over all processes."""
        for shard in self.shards.values():
            shard.localize_grad()
        if self.pipeline is not None and self.lm_loss.decoder.config.tied_head:
            self.pipeline.sum_tied_grads(self.shards)
        if self.replicas is not None:
            for table in sparse_tables(self.lm_loss.decoder).values():
                if table.grad is not None:
                    # gloo sends only the rows that a process has read; all get the same bits.
                    mean = table.grad.coalesce() / self.world.size
                    dist.all_reduce(mean)
                    table.grad = mean.coalesce()

        # Read once a step: to read them after each micro-batch would make a GPU wait.
        if self.world.size > 1:
            both = torch.stack([nats.double(), n_targets.double()])
            nats, n_targets = self.world.all_reduce_(both)
        # The ranks of a tp axis all have the loss; of a pp axis only the last.
        return float(nats) / self.axes.tensor, int(n_targets) // self.axes.tensor

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
        if not self.slices:
            return own
        shares = {name: square / len(self._owners(name)) for name, square in own.items()}
        names = sorted({name for slices in self.slices for name in slices})
        totals = self.world.all_sum(*(shares.get(name, 0.0) for name in names))
        return dict(zip(names, totals, strict=True))
