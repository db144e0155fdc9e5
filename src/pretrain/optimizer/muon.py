"""Muon: hidden matrices move by the nearest orthogonal matrix to their momentum, all else by AdamW.

"Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024). Update sizes are
matched to AdamW's, so that one learning rate serves both: "Muon is Scalable for LLM Training" (Liu
et al., 2025).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.optimizer.config import OptimizerConfig

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
MOMENTUM = 0.95
# Root mean square of an AdamW update of rate 1, as measured by Liu et al.
ADAMW_RMS = 0.2


def orthogonalize(matrices_NMK: Tensor) -> Tensor:
    """About the nearest (semi-)orthogonal matrix to each of a stack: singular values become roughly
    1.

    In float32 on a CPU, where bfloat16 would be emulated, and in bfloat16 on a GPU, where it is
    enough.
    """
    on_gpu = matrices_NMK.device.type == "cuda"
    x = matrices_NMK.bfloat16() if on_gpu else matrices_NMK.float()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) * SAFETY + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices_NMK.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, but for groups marked `orthogonal`, whose matrices are updated by Muon."""

    def __init__(self, groups: Iterable[dict[str, Any]], **defaults: Any) -> None:
        super().__init__([{"orthogonal": False, **group} for group in groups], **defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; the gradients of Muon's own matrices are gone afterwards."""
        for group in self.param_groups:
            if group["orthogonal"]:
                by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
                for parameter in group["params"]:
                    by_shape[parameter.shape].append(parameter)
                for parameters in by_shape.values():
                    self._update(parameters, group)
        # AdamW passes over parameters without a gradient.
        return super().step(closure)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape together: few large products instead of many small ones."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        memories = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            memories.append(state["momentum"])
            parameter.grad = None
        torch._foreach_lerp_(memories, gradients, 1 - MOMENTUM)
        # Nesterov's look ahead.
        ahead = torch._foreach_lerp(gradients, memories, MOMENTUM)
        updates = orthogonalize(torch.stack(list(ahead))).unbind()
        scale = ADAMW_RMS * math.sqrt(max(parameters[0].shape))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"] * scale)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may have it: a matrix from hidden to hidden, so no embedding and no head."""
    return parameter.ndim == 2 and "embedding" not in name and not name.startswith("head.")


def build_muon(named: list[tuple[str, nn.Parameter]], *, config: OptimizerConfig) -> Muon:
    hidden = [p for n, p in named if is_hidden_matrix(n, p)]
    tables = [p for n, p in named if p.ndim >= 2 and not is_hidden_matrix(n, p)]
    vectors = [p for _, p in named if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": hidden, "weight_decay": config.weight_decay, "orthogonal": True},
        {
            "params": tables,
            "weight_decay": config.weight_decay,
            "rate_scale": config.table_rate,
        },
        {"params": vectors, "weight_decay": 0.0},
    ]
    return Muon(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
