"""AdamW over named parameters: groups for decay, clipping, and a state that is addressed by
parameter name.

"Decoupled Weight Decay Regularization" (Loshchilov and Hutter, 2019), in torch's fused
implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pretrain.optimizer.config import OptimizerConfig
from pretrain.optimizer.muon import build_muon


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], *, config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW in two groups: tensors of two dims and more are decayed, norms and biases are not."""
    named = list(parameters)
    if config.name == "muon":
        return build_muon(named, config=config)
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)


def clip_gradients(parameters: Iterable[nn.Parameter], *, limit: float) -> float:
    """Scale all gradients so that their joint norm is at most `limit` (0: no limit); returns the
    norm before.

    A norm that is not finite leaves the gradients alone: the caller decides, and no NaN is spread
    by a scale.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    if limit and math.isfinite(total) and total > limit:
        # Not limit / (total + eps) as torch has it: the norm after clipping is `limit` itself.
        torch._foreach_mul_(gradients, limit / total)
    return total


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """The optimizer's memory as tensors named PARAMETER/KIND, for a checkpoint."""
    return {
        f"{name}/{kind}": value
        for name, parameter in parameters
        for kind, value in optimizer.state[parameter].items()
    }


def restore_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `optimizer_state` took out; a name without a parameter is our own mistake."""
    by_name = dict(parameters)
    for full_name, value in tensors.items():
        name, kind = full_name.rsplit("/", 1)
        optimizer.state[by_name[name]][kind] = value
