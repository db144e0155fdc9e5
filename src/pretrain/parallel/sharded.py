"""Sharded weights: FSDP2 over the data axes, and the record of which rank stores which slice.

Each rank stores a rectangular slice of a parameter, as a plain tensor that an optimizer updates.
Update rules that treat each element or each row by itself need no more than that. Muon needs full
matrices: `ShardedOrthogonalizer` exchanges their slices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.distributed import World
from pretrain.model.decoder import Decoder
from pretrain.optim.muon import Orthogonalizer, orthogonalize

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ShardSlice = tuple[tuple[int, int], ...]
"""(start, stop) in each dimension of a parameter."""


def apply_fsdp(decoder: Decoder, mesh: DeviceMesh, *, precision: str) -> None:
    """Shard a decoder over `mesh`: (shards), or (replicas, shards) for HSDP.

    "PyTorch FSDP" (Zhao et al., 2023). For the precision bf16 the weights of blocks, norms too, are
    gathered in bfloat16; stored weights and sums of gradients are float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    param_dtype = torch.bfloat16 if precision == "bf16" else None
    reduce_dtype = torch.float32 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)
    for block in decoder.blocks.values():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Embedding and head together: if they are tied, their parameter must be in one group.
    fully_shard(decoder, mesh=mesh)


@dataclass(frozen=True, slots=True)
class LocalShard:
    """This rank's slice of a parameter."""

    parameter: nn.Parameter
    """the model's parameter; a DTensor if it is sharded"""
    local: nn.Parameter
    """a plain tensor in the memory of the slice; `parameter` itself if that is not sharded"""
    shape: torch.Size
    """of the full parameter"""
    bounds: ShardSlice

    def localize_grad(self) -> None:
        """Set the gradient of the local tensor from that of the parameter."""
        if self.local is self.parameter:
            return
        grad, parameter = cast(Any, self.parameter.grad), cast(Any, self.parameter)
        if grad is not None:
            # It may still be a partial sum, or be replicated.
            grad = grad.redistribute(parameter.device_mesh, parameter.placements).to_local()
        self.local.grad = grad


def local_shard(parameter: nn.Parameter) -> LocalShard:
    """This rank's shard of a parameter, which is a DTensor if it is sharded."""
    data: Any = parameter.detach()
    bounds = [(0, n) for n in data.shape]
    if not hasattr(data, "placements"):  # importing DTensor takes half a second
        return LocalShard(parameter, parameter, parameter.shape, tuple(bounds))
    mesh = data.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    # The innermost axis of the mesh was split first: tp before FSDP.
    axes = list(zip(data.placements, mesh.shape, coordinate, strict=True))
    for placement, n, index in reversed(axes):
        if placement.is_replicate():
            continue
        start, stop = bounds[placement.dim]
        n_rows = math.ceil((stop - start) / n)
        first = min(start + index * n_rows, stop)
        bounds[placement.dim] = first, min(first + n_rows, stop)
    local = data.to_local()
    shape = [stop - start for start, stop in bounds]
    assert list(local.shape) == shape, f"DTensor has {list(local.shape)}, expected {shape}"
    return LocalShard(parameter, nn.Parameter(local), parameter.shape, tuple(bounds))


def take_slice(full: Tensor, bounds: ShardSlice) -> Tensor:
    """A view of a slice of a full tensor."""
    return full[tuple(slice(start, stop) for start, stop in bounds)]


def gather_slices(shards: Mapping[str, LocalShard], world: World) -> list[dict[str, ShardSlice]]:
    """Exchange which slice of each parameter a rank stores, by rank."""
    own = json.dumps({name: shard.bounds for name, shard in shards.items()})
    return [
        {name: tuple((start, stop) for start, stop in bounds) for name, bounds in rank.items()}
        for rank in map(json.loads, world.all_gather_str(own))
    ]


class ShardedOrthogonalizer(Orthogonalizer):
    """Orthogonalize matrices whose slices are stored by the ranks of `group`.

    Each matrix has one owner, round robin over the matrices of one shape. Slices are sent to the
    owners, which orthogonalize, and the results are sent back: the exchange of "Muon is Scalable
    for LLM Training" (Liu et al., 2025), without repeating the matmuls on every rank.
    """

    def __init__(
        self,
        shards: Mapping[str, LocalShard],
        slices: Sequence[Mapping[str, ShardSlice]],
        group: dist.ProcessGroup,
    ) -> None:
        self._shapes = {shard.local: shard.shape for shard in shards.values()}
        self._names = {shard.local: name for name, shard in shards.items()}
        self._slices, self._group = slices, group

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        return self._shapes[parameter]

    def orthogonalize(
        self,
        parameters: Sequence[nn.Parameter],
        rows: Sequence[Tensor],
        *,
        row_norm: bool,
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Return this rank's slices of the orthogonalized matrices; `rows` are its slices of the
        matrices."""
        ranks = dist.get_process_group_ranks(self._group)
        owned_by = [range(owner, len(rows), len(ranks)) for owner in range(len(ranks))]
        owned = owned_by[dist.get_rank(self._group)]

        # Send each owner its slices, in their order; receive those of owned matrices, by rank.
        sent = torch.cat([rows[i].reshape(-1) for indices in owned_by for i in indices])
        n_sent = [sum(rows[i].numel() for i in indices) for indices in owned_by]
        full = sent.new_empty(len(owned), *self.full_shape(parameters[0]))
        views = [
            [
                take_slice(matrix, self._slices[rank][self._names[parameters[i]]])
                for matrix, i in zip(full, owned, strict=True)
            ]
            for rank in ranks
        ]
        n_received = [sum(view.numel() for view in of_rank) for of_rank in views]
        flat_views = [view for of_rank in views for view in of_rank]
        _copy_from_flat(flat_views, self._all_to_all(sent, n_sent, n_received))

        if owned:
            full.copy_(orthogonalize(full, row_norm=row_norm, dtype=dtype))

        # The same way back.
        answer = torch.cat([view.reshape(-1) for view in flat_views]) if owned else sent[:0]
        results = [torch.empty_like(row) for row in rows]
        in_sent_order = [results[i] for indices in owned_by for i in indices]
        _copy_from_flat(in_sent_order, self._all_to_all(answer, n_received, n_sent))
        return results

    def _all_to_all(self, sent: Tensor, n_sent: list[int], n_received: list[int]) -> Tensor:
        received = sent.new_empty(sum(n_received))
        dist.all_to_all_single(received, sent, n_received, n_sent, group=self._group)
        return received


def _copy_from_flat(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Fill tensors with the elements of `flat`, one tensor after another."""
    stops = accumulate(tensor.numel() for tensor in tensors)
    for tensor, stop in zip(tensors, stops, strict=True):
        tensor.copy_(flat[stop - tensor.numel() : stop].view(tensor.shape))
