"""Muon: a hidden matrix moves by the nearest orthogonal matrix to its momentum.

"Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024). Update sizes are
matched to AdamW's, so that one learning rate serves both: "Muon is Scalable for LLM Training" (Liu
et al., 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Five steps of the polynomial iteration that converges fastest to the polar factor from singular
# values in [1e-3, 1]: "The Polar Express" (Amsel et al., 2025), algorithm 1 with a safety factor of
# 1.02.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02
# Root mean square of an AdamW update of rate 1, as measured by Liu et al.
ADAMW_RMS = 0.2


def orthogonalize(matrices_NMK: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """About the nearest (semi-)orthogonal matrix to each of a stack: singular values become roughly
    1. bfloat16 is enough, where the device has it."""
    x = matrices_NMK.to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) * SAFETY + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices_NMK.dtype)


class Orthogonalizer:
    """How the rule comes to whole matrices: here they are."""

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of the matrix that a parameter is (part of)."""
        return parameter.shape

    def orthogonalize(
        self, parameters: Sequence[nn.Parameter], rows: Sequence[Tensor], *, dtype: torch.dtype
    ) -> Sequence[Tensor]:
        """What matrices of one shape become, of which a parameter each holds `rows`."""
        return orthogonalize(torch.stack(list(rows)), dtype=dtype).unbind()


@torch.no_grad()
def muon_update(
    parameters: list[nn.Parameter],
    memories: list[Tensor],
    gradients: list[Tensor],
    *,
    rate: float,
    momentum: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
    orthogonalizer: Orthogonalizer,
) -> None:
    """Move matrices of one shape together, in place: few large products instead of many small."""
    torch._foreach_lerp_(memories, gradients, 1 - momentum)
    # Nesterov's look ahead.
    ahead = torch._foreach_lerp(gradients, memories, momentum)
    updates = orthogonalizer.orthogonalize(parameters, ahead, dtype=dtype)
    matrices: list[Tensor] = list(parameters)
    torch._foreach_mul_(matrices, 1 - rate * weight_decay)
    size = ADAMW_RMS * math.sqrt(max(orthogonalizer.full_shape(parameters[0])))
    torch._foreach_add_(matrices, list(updates), alpha=-rate * size)
