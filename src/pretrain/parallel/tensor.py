"""The tensor axis: the heads of attention, the columns of a feed-forward layer and the vocabulary,
shared among processes that see the same rows.

"Megatron-LM" (Shoeybi et al., 2019), by torch's DTensor: query, key, value, gate and up give each
process some of their outputs, output and down take them and sum. Embedding and head are cut by
vocabulary, also where they are one parameter, and the loss is made from the pieces of each row's
logits. Norms, positions and n-gram tables are whole everywhere.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from pretrain.model import Decoder, LMLoss
from pretrain.model.loss import IGNORE_INDEX

_CUT_BY_OUTPUT = ("attention.query", "attention.key", "attention.value")
_CUT_BY_INPUT = ("attention.output", "feed_forward.down")
# Logits of a process that exist at once.
_CHUNK_LOGITS = 1 << 22


def lay_over_tensor_axis(lm_loss: LMLoss, mesh: DeviceMesh) -> None:
    """Cut the weights of a decoder, in place, over a mesh of one axis, and let loss and logits be
    made from what each process has."""
    decoder = lm_loss.decoder
    for block in decoder.blocks.values():
        ups = [n for n in ("gate", "up") if getattr(block.feed_forward, n) is not None]
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in _CUT_BY_OUTPUT}
        plan |= {f"feed_forward.{name}": ColwiseParallel() for name in ups}
        plan |= {name: RowwiseParallel() for name in _CUT_BY_INPUT}
        for name in plan:
            # The model's own faster product knows plain tensors only.
            layer = block.get_submodule(name)
            layer.forward = partial(nn.Linear.forward, cast(nn.Linear, layer))
        # What several of them read becomes one tensor of all processes: its slopes are summed once.
        plan |= {"attention": _read_by_several(4), "feed_forward": _read_by_several(1)}
        parallelize_module(block, mesh, plan)
    if decoder.token_embedding is not None:  # not every process of a pipeline has it
        by_vocabulary = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(decoder, mesh, {"token_embedding": by_vocabulary})
    if decoder.head is not None:
        laid = distribute_tensor(decoder.head.weight, mesh, [Shard(0)])
        decoder.head.weight = nn.Parameter(laid)
    lm_loss.cross_entropy = partial(_cross_entropy, mesh)
    decoder.logits = partial(_logits, decoder, mesh)  # type: ignore[method-assign]


def _read_by_several(n_arguments: int) -> PrepareModuleInput:
    """For a module whose first argument several of its layers read."""
    layouts = (Replicate(), *(None,) * (n_arguments - 1))
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)


def _logits(decoder: Decoder, mesh: DeviceMesh, hidden: Tensor) -> Tensor:
    """Whole logits (..., V), the same on each process."""
    weight = cast(DTensor, decoder.head_weight)
    pieces = DTensor.from_local(
        hidden @ weight.to_local().T,
        mesh,
        [Shard(hidden.ndim - 1)],
        shape=torch.Size((*hidden.shape[:-1], weight.shape[0])),
        stride=torch.empty(*hidden.shape[:-1], weight.shape[0], device="meta").stride(),
    )
    return pieces.full_tensor()


def _cross_entropy(
    mesh: DeviceMesh,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """As `chunked_cross_entropy`, from a weight of which each process has some rows."""
    weight = cast(DTensor, weight_VD)
    local = weight.to_local()
    each = -(-weight.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * each, weight.shape[0])
    # The same for all, also where the vocabulary does not divide: they sum chunk by chunk.
    rows = max(1, _CHUNK_LOGITS // each)
    how = (first, weight.shape[0], smoothing, z_loss)
    nats: Tensor = _VocabularyCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, local, targets_N, rows, how, mesh.get_group()
    )
    return nats


class _VocabularyCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target], each process with some of the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_WD: Tensor,
        targets_N: Tensor,
        rows: int,
        how: tuple[int, int, float, float],
        group: dist.ProcessGroup,
    ) -> Tensor:
        d_hidden, d_weight = torch.empty_like(hidden_ND), torch.zeros_like(weight_WD)
        weight = weight_WD.to(hidden_ND.dtype)
        nats = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        for start in range(0, len(hidden_ND), rows):
            hidden, targets = hidden_ND[start : start + rows], targets_N[start : start + rows]
            slope, chunk_nats = _slope(hidden @ weight.T, targets, how, group)
            nats += chunk_nats
            d_hidden[start : start + rows] = slope.to(hidden.dtype) @ weight
            d_weight += (slope.to(hidden.dtype).T @ hidden).to(d_weight.dtype)
        dist.all_reduce(d_hidden, group=group)
        ctx.save_for_backward(d_hidden, d_weight)
        return nats

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        slope = slopes[0]
        return (
            d_hidden * slope.to(d_hidden.dtype),
            d_weight * slope.to(d_weight.dtype),
            None,
            None,
            None,
            None,
        )


def _slope(
    logits: Tensor, targets_N: Tensor, how: tuple[int, int, float, float], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """What the objective's slope is at this process's logits (N, W), and the chunk's nats."""
    first, V, smoothing, z_loss = how
    logits_NW = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted_N = targets_N != IGNORE_INDEX
    # Which rows have their target here is not asked, since a GPU would have to wait for the answer.
    W, places_N1 = logits_NW.shape[1], (targets_N - first)[:, None]
    is_here_N1 = counted_N[:, None] & (places_N1 >= 0) & (places_N1 < W)
    if W:
        places_N1 = places_N1.clamp(0, W - 1)
        largest_N = logits_NW.amax(1)
        chosen_N = torch.where(is_here_N1, logits_NW.gather(1, places_N1), 0)[:, 0]
    else:
        largest_N = logits_NW.new_full(counted_N.shape, torch.finfo(logits_NW.dtype).min)
        chosen_N = torch.zeros_like(largest_N)
    dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=group)
    slope_NW = (logits_NW - largest_N[:, None]).exp_()
    both = torch.stack([slope_NW.sum(1), chosen_N])
    dist.all_reduce(both, group=group)
    total_N, chosen_N = both
    log_sum_N = total_N.log() + largest_N
    nats = torch.where(counted_N, log_sum_N - chosen_N, 0).sum(dtype=torch.float64)
    slope_NW /= total_N[:, None]
    if z_loss:
        slope_NW *= (1 + 2 * z_loss * log_sum_N)[:, None]
    if W:
        slope_NW.scatter_add_(1, places_N1, (smoothing - 1.0) * is_here_N1.to(slope_NW.dtype))
    if smoothing:
        slope_NW -= smoothing / V
    return slope_NW * counted_N[:, None], nats
