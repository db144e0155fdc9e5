"""Sparse gradients over several processes: the rows that anybody has read, and no whole tables.

The accelerated twin of a sum over dense gradients, of which almost all is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


def mean_rows_(tables: Sequence[nn.Parameter], size: int) -> None:
    """Let the sparse gradients of `tables` (each R, D, of one D) be the mean over `size` processes,
    in the same bits for each of them."""
    mine = [table.grad.coalesce() for table in tables if table.grad is not None]
    n_rows = torch.tensor([len(gradient.values()) for gradient in mine])
    counts = n_rows.new_empty(size, len(mine))
    dist.all_gather(list(counts.unbind()), n_rows)
    # As long for everybody as the longest is: an exchange is of equal parts.
    longest = int(counts.sum(1).max())
    values_ND = torch.cat([gradient.values() for gradient in mine])
    rows_N = torch.cat([gradient.indices()[0] for gradient in mine])
    sent_values = values_ND.new_zeros(longest, values_ND.shape[1])
    sent_rows = rows_N.new_zeros(longest)
    sent_values[: len(values_ND)], sent_rows[: len(rows_N)] = values_ND / size, rows_N
    all_values = sent_values.new_empty(size, *sent_values.shape)
    all_rows = sent_rows.new_empty(size, longest)
    dist.all_gather(list(all_values.unbind()), sent_values)
    dist.all_gather(list(all_rows.unbind()), sent_rows)
    stops = counts.cumsum(1)
    for n, table in enumerate(tables):
        bounds = [(int(s[n] - c[n]), int(s[n])) for s, c in zip(stops, counts, strict=True)]
        rows = torch.cat([all_rows[r, a:b] for r, (a, b) in enumerate(bounds)])
        values = torch.cat([all_values[r, a:b] for r, (a, b) in enumerate(bounds)])
        summed = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=False)
        table.grad = summed.coalesce()
