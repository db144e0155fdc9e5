"""Muon: a hidden matrix moves along the nearest orthogonal matrix to its momentum.

"Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024). For a matrix W of
shape (n, m) with gradient G, momentum M, learning rate lr and weight decay wd:

    M <- mu M + (1 - mu) G
    N  = mu M + (1 - mu) G                      (Nesterov's look-ahead)
    O  = U V^T, for the singular value decomposition N = U S V^T; with `row_norm` of N with rows of
         one length
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(n, m)) O

The factor 0.2 sqrt(max(n, m)) gives an update the root mean square of AdamW's, so that one learning
rate serves both: "Muon is Scalable for LLM Training" (Liu et al., 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.compat import onednn_linear, uses_onednn

# The coefficients of five steps of the polynomial iteration that converges fastest to O from
# singular values in [1e-3, 1]: "The Polar Express" (Amsel et al., 2025), algorithm 1 with a safety
# factor of 1.02.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02
# Root mean square of an AdamW update at a learning rate of 1, as measured by Liu et al.
ADAMW_RMS = 0.2


def orthogonalize(
    matrices_NMK: Tensor, *, row_norm: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return about the nearest (semi-)orthogonal matrix to each of a stack of N matrices.

    Singular values become roughly 1. Each step is x <- a x + (b A + c A^2) x with A = x x^T, in
    `dtype`; bfloat16 is precise enough.
    """
    x = (F.normalize(matrices_NMK, dim=2) if row_norm else matrices_NMK).to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) * SAFETY + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        if uses_onednn(x[0], x):
            gram = _product(x, x)
            polynomial = _product(gram, gram).mul_(c).add_(gram, alpha=b)
            x = _product(polynomial, x.mT).add_(x, alpha=a)
            continue
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if is_tall:
        x = x.mT
    return x.to(matrices_NMK.dtype)


def _product(a_NMK: Tensor, b_NPK: Tensor) -> Tensor:
    """Compute a b^T of each pair of matrices by oneDNN."""
    return torch.stack([onednn_linear(a, b) for a, b in zip(a_NMK, b_NPK, strict=True)])


class Orthogonalizer:
    """Orthogonalizes updates of full matrices; sharded training replaces it (`parallel`)."""

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape of the full matrix of which `parameter` is this process's shard."""
        return parameter.shape

    def orthogonalize(
        self,
        parameters: Sequence[nn.Parameter],
        updates: Sequence[Tensor],
        *,
        row_norm: bool,
        dtype: torch.dtype,
    ) -> Sequence[Tensor]:
        """Return this process's shard of each orthogonalized update.

        All matrices have one full shape; `updates` has a shard for each parameter.
        """
        return orthogonalize(torch.stack(list(updates)), row_norm=row_norm, dtype=dtype).unbind()


@torch.no_grad()
def muon_update(
    parameters: list[nn.Parameter],
    momenta: list[Tensor],
    gradients: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    row_norm: bool = False,
    dtype: torch.dtype = torch.float32,
    orthogonalizer: Orthogonalizer,
) -> None:
    """Update matrices of one full shape together, in place: a few large matmuls, not many small."""
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)
    nesterov = torch._foreach_lerp(gradients, momenta, momentum)
    directions = orthogonalizer.orthogonalize(parameters, nesterov, row_norm=row_norm, dtype=dtype)

    matrices: list[Tensor] = list(parameters)
    torch._foreach_mul_(matrices, 1 - lr * weight_decay)
    scale = ADAMW_RMS * math.sqrt(max(orthogonalizer.full_shape(parameters[0])))
    torch._foreach_add_(matrices, list(directions), alpha=-lr * scale)
