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
from pretrain.model.loss import IGNORE_INDEX, LMLoss, attach_grad, softmax_grad_

# Logits of a rank that exist at once.
_CHUNK_LOGITS = 1 << 22


# How the modules of a block that have weights are split: by their output features, by their input
# features, or not at all.
_STYLES: dict[str, type[ColwiseParallel | RowwiseParallel] | None] = {
    "attention_norm": None,
    "attention.query": ColwiseParallel,
    "attention.key": ColwiseParallel,
    "attention.value": ColwiseParallel,
    "attention.output": RowwiseParallel,
    "feed_forward_norm": None,
    "feed_forward.gate": ColwiseParallel,
    "feed_forward.up": ColwiseParallel,
    "feed_forward.down": RowwiseParallel,
}


def block_plan(block: nn.Module) -> dict[str, ParallelStyle]:
    """Return how the layers of a block are split; ValueError for a module that _STYLES lacks."""
    plan: dict[str, ParallelStyle] = {}
    for name in dict.fromkeys(name.rpartition(".")[0] for name, _ in block.named_parameters()):
        if name not in _STYLES:
            raise ValueError(
                f"parallel.tensor must be 1: this architecture has {name}, which cannot be split "
                "over processes"
            )
        if (style := _STYLES[name]) is not None:
            plan[name] = style()
    return plan


def apply_tensor_parallel(lm_loss: LMLoss, mesh: DeviceMesh) -> None:
    """Split the weights of a decoder, in place, over a mesh of one axis, and let the loss be
    computed from each rank's part of the vocabulary."""
    decoder = lm_loss.decoder
    for block in decoder.blocks.values():
        plan = block_plan(block)
        for name in plan:
            # The model's own faster linear layer takes plain tensors only.
            layer = block.get_submodule(name)
            layer.forward = partial(nn.Linear.forward, cast(nn.Linear, layer))
        # The input of several layers becomes one DTensor, so that its gradients are summed once.
        for name, n_arguments in (("attention", 4), ("feed_forward", 1)):
            layouts = (Replicate(), *(None,) * (n_arguments - 1))
            plan[name] = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
        parallelize_module(block, mesh, plan)
    if decoder.token_embedding is not None:  # only some ranks of a pipeline have it
        by_vocabulary = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(decoder, mesh, {"token_embedding": by_vocabulary})
    if decoder.head is not None:
        head_weight = distribute_tensor(decoder.head.weight, mesh, [Shard(0)])
        decoder.head.weight = nn.Parameter(head_weight)
    lm_loss.cross_entropy = vocab_parallel_cross_entropy


def full_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Logits (..., V), the same on each rank; the head may be split over the tp axis."""
    weight = decoder.head_weight
    if not isinstance(weight, DTensor):
        return hidden @ weight.T
    replicated = DTensor.from_local(hidden, weight.device_mesh, [Replicate()])
    return cast(DTensor, replicated @ weight.T).full_tensor()


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
        nats = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        d_hidden_ND = torch.empty_like(hidden_ND)
        d_weight_WD = torch.zeros_like(local_weight)
        weight_WD = local_weight.to(hidden_ND.dtype)
        W = len(weight_WD)
        for start in range(0, len(hidden_ND), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            hidden, targets_N1 = hidden_ND[chunk], targets_N[chunk, None]
            logits_NW = hidden @ weight_WD.T
            logits_NW = logits_NW.to(torch.promote_types(logits_NW.dtype, torch.float32))
            is_valid_N1, column_N1 = targets_N1 != IGNORE_INDEX, targets_N1 - first
            # A mask, not an index: a GPU would have to synchronise to count the targets here.
            has_target_N1 = is_valid_N1 & (column_N1 >= 0) & (column_N1 < W)
            column_N1 = column_N1.clamp(0, max(0, W - 1))

            if W:
                max_N1 = logits_NW.amax(1, keepdim=True)
                target_logit_N1 = torch.where(has_target_N1, logits_NW.gather(1, column_N1), 0)
            else:
                max_N1 = logits_NW.new_full(column_N1.shape, torch.finfo(logits_NW.dtype).min)
                target_logit_N1 = torch.zeros_like(max_N1)
            dist.all_reduce(max_N1, op=dist.ReduceOp.MAX, group=group)
            p_NW = (logits_NW - max_N1).exp_()
            sums = torch.stack([p_NW.sum(1, keepdim=True), target_logit_N1])
            dist.all_reduce(sums, group=group)
            sum_N1, target_logit_N1 = sums
            p_NW /= sum_N1
            log_sum_N1 = sum_N1.log() + max_N1
            nats += torch.where(is_valid_N1, log_sum_N1 - target_logit_N1, 0).sum(dtype=nats.dtype)
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
            grad_NW = (p_NW * is_valid_N1).to(hidden.dtype)
            d_hidden_ND[chunk] = grad_NW @ weight_WD
            d_weight_WD += (grad_NW.T @ hidden).to(d_weight_WD.dtype)
        dist.all_reduce(d_hidden_ND, group=group)
    return attach_grad(hidden_ND, local_weight, nats, d_hidden_ND, d_weight_WD)
