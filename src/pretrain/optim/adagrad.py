"""Row-wise Adagrad, for lookup tables of which a step reads few rows.

"Adaptive Subgradient Methods for Online Learning and Stochastic Optimization" (Duchi et al., 2011)
with one sum of squares for a whole row, as in "Deep Learning Recommendation Model" (Naumov et al.,
2019). A row without a gradient neither moves nor forgets. So to update only the rows that a sparse
gradient names is not an approximation: it is what a dense gradient, zero elsewhere, does.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-10


@torch.no_grad()
def adagrad_update(table_RD: Tensor, squares_R: Tensor, gradient: Tensor, *, rate: float) -> None:
    """Move a table against its gradient, dense (R, D) or sparse and coalesced, in place."""
    if gradient.is_sparse:
        rows_N, slope_ND = gradient.indices()[0], gradient.values()
    else:
        rows_N, slope_ND = torch.arange(len(table_RD), device=table_RD.device), gradient
    squares_N = squares_R[rows_N] + slope_ND.square().mean(1)
    squares_R.index_copy_(0, rows_N, squares_N)
    table_RD.index_add_(0, rows_N, slope_ND / (squares_N.sqrt() + EPSILON)[:, None], alpha=-rate)
