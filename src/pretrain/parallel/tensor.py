"""Tensor parallelism: attention heads, feed-forward columns and the vocabulary are split over the
ranks of the tp axis, which see the same rows.

"Megatron-LM" (Shoeybi et al., 2019), by torch's DTensor: query, key, value, gate and up compute
some of their outputs on each rank, output and down take these and sum. Embedding and head are split
by vocabulary, also if they are tied, and the loss is computed from each rank's part of the logits.
Norms, positions and n-gram tables are replicated.
"""

from __future__ import annotations

import math
from functools import partial
from typing import cast

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

from pretrain.model.decoder import Decoder
from pretrain.model.layers import tensor_splits
from pretrain.model.loss import IGNORE_INDEX, LMLoss, attach_grad, softmax_grad_

# Logits of a rank that exist at once.
_CHUNK_LOGITS = 1 << 22


def apply_tensor_parallel(lm_loss: LMLoss, mesh: DeviceMesh) -> None:
    """Split the weights of a decoder, in place, over a mesh of one axis, and let the loss be
    computed from each rank's part of the vocabulary."""
    decoder = lm_loss.decoder
    for block in decoder.blocks.values():
        plan: dict[str, ParallelStyle] = {}
        for name, split in tensor_splits(block).items():
            if split == "output":
                plan[name] = ColwiseParallel()
            elif split == "input":
                plan[name] = RowwiseParallel()
        for name in plan:
            # The model's own faster linear layer takes plain tensors only.
            layer = block.get_submodule(name)
            layer.forward = partial(nn.Linear.forward, cast(nn.Linear, layer))
        # The input of several layers becomes one DTensor, so that its gradients are summed once.
        plan["attention"] = _replicate_first_argument(n_arguments=4)
        plan["feed_forward"] = _replicate_first_argument(n_arguments=1)
        parallelize_module(block, mesh, plan)
    if decoder.token_embedding is not None:  # only some ranks of a pipeline have it
        by_vocabulary = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(decoder, mesh, {"token_embedding": by_vocabulary})
    if decoder.head is not None:
        head_weight = distribute_tensor(decoder.head.weight, mesh, [Shard(0)])
        decoder.head.weight = nn.Parameter(head_weight)
    lm_loss.cross_entropy = vocab_parallel_cross_entropy


def _replicate_first_argument(*, n_arguments: int) -> PrepareModuleInput:
    layouts = (Replicate(), *(None,) * (n_arguments - 1))
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)


def full_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Logits (..., V), the same on each rank; the head may be split over the tp axis."""
    weight = decoder.head_weight
    if not isinstance(weight, DTensor):
        return hidden @ weight.T
    shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))
    local = DTensor.from_local(
        hidden @ weight.to_local().T,
        weight.device_mesh,
        [Shard(hidden.ndim - 1)],
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return local.full_tensor()


def vocab_parallel_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """As `chunked_cross_entropy`, from a head weight of which each rank has some rows (W, D)."""
    weight = cast(DTensor, weight_VD)
    mesh, V = weight.device_mesh, weight.shape[0]
    group = mesh.get_group()
    local_weight = weight.to_local()
    # The same on all ranks, also if V is not divisible: they reduce chunk by chunk.
    rows_per_rank = math.ceil(V / mesh.size())
    first = min(mesh.get_local_rank() * rows_per_rank, V)
    chunk_rows = max(1, _CHUNK_LOGITS // rows_per_rank)

    with torch.no_grad():
        loss = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        d_hidden_ND = torch.empty_like(hidden_ND)
        d_weight_WD = torch.zeros_like(local_weight)
        weight_WD = local_weight.to(hidden_ND.dtype)
        for start in range(0, len(hidden_ND), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            hidden, targets = hidden_ND[chunk], targets_N[chunk]
            chunk_loss, grad_NW = _loss_and_grad(
                hidden @ weight_WD.T, targets, first, V, smoothing, z_loss, group
            )
            loss += chunk_loss
            grad_NW = grad_NW.to(hidden.dtype)
            d_hidden_ND[chunk] = grad_NW @ weight_WD
            d_weight_WD += (grad_NW.T @ hidden).to(d_weight_WD.dtype)
        dist.all_reduce(d_hidden_ND, group=group)
    return attach_grad(loss, hidden_ND, d_hidden_ND, local_weight, d_weight_WD)


def _loss_and_grad(
    logits: Tensor,
    targets_N: Tensor,
    first: int,
    V: int,
    smoothing: float,
    z_loss: float,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """The summed loss of some rows, and its gradient by this rank's logits (N, W), which are those
    of the vocabulary from `first` on."""
    logits_NW = logits.to(torch.promote_types(logits.dtype, torch.float32))
    W = logits_NW.shape[1]
    is_valid_N1 = (targets_N != IGNORE_INDEX)[:, None]
    column_N1 = (targets_N - first)[:, None]
    # A mask, not an index: to count the rows whose target is here, a GPU would have to synchronise.
    has_target_N1 = is_valid_N1 & (column_N1 >= 0) & (column_N1 < W)
    column_N1 = column_N1.clamp(0, max(0, W - 1))

    if W:
        max_N1 = logits_NW.amax(1, keepdim=True)
        target_logit_N1 = torch.where(has_target_N1, logits_NW.gather(1, column_N1), 0)
    else:
        max_N1 = logits_NW.new_full((len(targets_N), 1), torch.finfo(logits_NW.dtype).min)
        target_logit_N1 = torch.zeros_like(max_N1)
    dist.all_reduce(max_N1, op=dist.ReduceOp.MAX, group=group)
    p_NW = (logits_NW - max_N1).exp_()
    sums = torch.stack([p_NW.sum(1, keepdim=True), target_logit_N1])
    dist.all_reduce(sums, group=group)
    sum_N1, target_logit_N1 = sums
    p_NW /= sum_N1
    log_sum_N1 = sum_N1.log() + max_N1
    loss = torch.where(is_valid_N1, log_sum_N1 - target_logit_N1, 0).sum(dtype=torch.float64)
    if W:
        softmax_grad_(
            p_NW,
            column_N1,
            log_sum_N1,
            vocab_size=V,
            smoothing=smoothing,
            z_loss=z_loss,
            has_target_N1=has_target_N1,
        )
    return loss, p_NW * is_valid_N1
