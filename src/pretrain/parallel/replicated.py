"""Data parallelism: each process has a full copy of the model, and gradients are averaged.

Dense gradients are reduced by torch's DistributedDataParallel while backward runs ("PyTorch
Distributed", Li et al., 2020). Sparse gradients of embedding tables are exchanged as rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.compat import ddp_ignore_parameters
from pretrain.distributed import World
from pretrain.model.decoder import Decoder
from pretrain.model.loss import LMLoss


def sparse_tables(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Embedding tables with sparse gradients, by their names in the decoder."""
    ngrams = decoder.ngrams
    if ngrams is None or not ngrams.sparse_gradients:
        return {}
    return {f"ngrams.{name}": table for name, table in ngrams.named_parameters()}


def replicate(lm_loss: LMLoss, world: World) -> DistributedDataParallel:
    """Wrap a loss module, so that backward averages its dense gradients over all processes."""
    ddp_ignore_parameters(lm_loss, [f"decoder.{name}" for name in sparse_tables(lm_loss.decoder)])
    return DistributedDataParallel(
        lm_loss,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        # Initial weights are a function of the seed, the same on all ranks.
        init_sync=False,
        gradient_as_bucket_view=True,
    )


def average_sparse_grads_(tables: Sequence[nn.Parameter], size: int) -> None:
    """Replace the sparse gradients of `tables` (R, D) by their mean over `size` processes.

    The result has the same bits on all ranks. Only the rows that a process has read are sent, those
    of all tables of one width D together.
    """
    for width in sorted({table.shape[1] for table in tables}):
        same_width = [table for table in tables if table.shape[1] == width]
        grads = [table.grad.coalesce() for table in same_width if table.grad is not None]
        n_rows = torch.tensor([len(grad.values()) for grad in grads])
        n_rows_of_rank = n_rows.new_empty(size, len(grads))
        dist.all_gather(list(n_rows_of_rank.unbind()), n_rows)

        # all_gather needs equal sizes: pad to the longest.
        longest = int(n_rows_of_rank.sum(1).max())
        values_ND = torch.cat([grad.values() for grad in grads]) / size
        all_values = _all_gather_padded(values_ND, longest, size)
        rows_N = torch.cat([grad.indices()[0] for grad in grads])
        all_rows = _all_gather_padded(rows_N, longest, size)

        stops = n_rows_of_rank.cumsum(1)
        starts = stops - n_rows_of_rank
        for i, table in enumerate(same_width):
            spans = [slice(int(a), int(b)) for a, b in zip(starts[:, i], stops[:, i], strict=True)]
            rows = torch.cat([all_rows[rank, span] for rank, span in enumerate(spans)])
            values = torch.cat([all_values[rank, span] for rank, span in enumerate(spans)])
            mean = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=False)
            table.grad = mean.coalesce()


def _all_gather_padded(tensor: Tensor, length: int, size: int) -> Tensor:
    """The tensors (N, ...) of all processes, padded with zeros: (size, length, ...)."""
    padded = tensor.new_zeros(length, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    gathered = padded.new_empty(size, *padded.shape)
    dist.all_gather(list(gathered.unbind()), padded)
    return gathered
