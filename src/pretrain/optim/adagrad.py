"""Row-wise Adagrad, for lookup tables of which a step reads few rows.

For row r with gradient g: s_r <- s_r + mean(g^2), row <- row - lr g / (sqrt(s_r) + epsilon).
"Adaptive Subgradient Methods for Online Learning and Stochastic Optimization" (Duchi et al., 2011)
with one sum for a row, as in "Deep Learning Recommendation Model" (Naumov et al., 2019). A row with
gradient 0 keeps its values and its state, so updating only the rows of a sparse gradient is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-10


@torch.no_grad()
def adagrad_update(table_RD: Tensor, squares_R: Tensor, gradient: Tensor, *, lr: float) -> None:
    """Update a table and its state in place; the gradient is dense (R, D) or sparse, coalesced."""
    if gradient.is_sparse:
        rows_N, grad_ND = gradient.indices()[0], gradient.values()
    else:
        rows_N, grad_ND = torch.arange(len(table_RD), device=table_RD.device), gradient
    squares_N = squares_R[rows_N] + grad_ND.square().mean(1)
    squares_R.index_copy_(0, rows_N, squares_N)
    table_RD.index_add_(0, rows_N, grad_ND / (squares_N.sqrt() + EPSILON)[:, None], alpha=-lr)
