"""Parameters in groups, each with its own rule, and a state that is addressed by parameter name.

The rules: AdamW, "Decoupled Weight Decay Regularization" (Loshchilov and Hutter, 2019), in torch's
fused implementation; Muon (`muon`) for hidden matrices; row-wise Adagrad (`adagrad`) for lookup
tables. Also here: the norm and the clipping of gradients, dense and sparse.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.compat import without_compiler_guard
from pretrain.optim.adagrad import adagrad_update
from pretrain.optim.config import OptimizerConfig
from pretrain.optim.muon import Orthogonalizer, muon_update

# A row of a lookup table is read rarely and may learn fast when it is.
LOOKUP_RATE = 4.0
# A row's first move would be a whole one, however little its first reading says. So it is as if the
# row had been read before, with this mean square of the gradient of a sum over targets.
FIRST_SQUARE = 2.0


class MixedOptimizer(torch.optim.AdamW):
    """AdamW, but for groups whose `rule` is muon or adagrad."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, orthogonalizer: Orthogonalizer, **defaults: Any
    ) -> None:
        super().__init__([{"rule": "adamw", **group} for group in groups], **defaults)
        self._orthogonalizer = orthogonalizer

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; gradients that another rule than AdamW's has used are gone afterwards."""
        for group in self.param_groups:
            if group["rule"] == "adamw":
                continue
            used = [p for p in group["params"] if p.grad is not None]
            if group["rule"] == "muon":
                self._update_matrices(used, group)
            else:
                for parameter in used:
                    first = group["first_square"]
                    squares = self._memory(parameter, "squares", parameter.shape[:1], first)
                    adagrad_update(parameter, squares, parameter.grad, rate=group["lr"])
            for parameter in used:
                parameter.grad = None
        # AdamW passes over parameters without a gradient.
        return without_compiler_guard(torch.optim.AdamW.step)(self, closure)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        without_compiler_guard(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        without_compiler_guard(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    def _update_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[self._orthogonalizer.full_shape(parameter)].append(parameter)
        for alike in by_shape.values():
            muon_update(
                alike,
                [self._memory(p, "momentum", p.shape) for p in alike],
                [p.grad for p in alike if p.grad is not None],
                rate=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                dtype=group["dtype"],
                orthogonalizer=self._orthogonalizer,
            )

    def _memory(
        self, parameter: nn.Parameter, kind: str, shape: torch.Size, first: float = 0.0
    ) -> Tensor:
        state = self.state[parameter]
        if kind not in state:
            state[kind] = parameter.new_full(shape, first)
        memory: Tensor = state[kind]
        return memory


def role_of(name: str, parameter: nn.Parameter) -> str:
    """What a parameter is to an optimizer: lookup (an n-gram table), embedding, head, vector, or
    hidden: a matrix from hidden to hidden."""
    # A name may come with a prefix, as those of an Objective do.
    *path, _ = name.split(".")
    if parameter.ndim < 2:
        return "vector"
    if "ngrams" in path:
        return "lookup"
    return "embedding" if "embedding" in name else "head" if "head" in path else "hidden"


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    config: OptimizerConfig,
    width: int | None = None,
    batch_tokens: int = 8192,
    precision: str = "fp32",
    orthogonalizer: Orthogonalizer | None = None,
) -> MixedOptimizer:
    """The optimizer over named parameters: a group for each role. Vectors (norms and biases) and
    lookup tables are not decayed. `width` is the model's, which a config with a base_width asks
    for. Gradients are means over `batch_tokens` targets, to which the rates are fitted if the
    config has base_batch_tokens. Muon's products are made in `precision`, of `matrices` that may
    be laid over processes."""
    with_muon = config.name == "muon"
    # The rate suits Muon's matrices, and what AdamW moves beside them takes a multiple of it.
    embedding_lr_mult, head_lr_mult = (
        (config.embedding_lr_mult, config.head_lr_mult) if with_muon else (1.0, 1.0)
    )
    width_scale = config.width_scale(width)
    groups: dict[str, dict[str, Any]] = {
        "hidden": {
            "lr_mult": width_scale,
            "rule": "muon" if with_muon else "adamw",
            "momentum": config.momentum,
            "dtype": torch.bfloat16 if precision == "bf16" else torch.float32,
        },
        "embedding": {"lr_mult": embedding_lr_mult},
        "head": {"lr_mult": head_lr_mult * width_scale},
        "vector": {"weight_decay": 0.0},
        "lookup": {
            "rule": "adagrad",
            "lr_mult": LOOKUP_RATE * embedding_lr_mult,
            "first_square": FIRST_SQUARE / batch_tokens**2,
            "weight_decay": 0.0,
        },
    }
    members: dict[str, list[nn.Parameter]] = {role: [] for role in groups}
    for name, parameter in parameters:
        role = role_of(name, parameter)
        # Muon's matrices are put together by all that hold them, also who holds no row of this one.
        if parameter.numel() or groups[role].get("rule") == "muon":
            members[role].append(parameter)
    batch_scale = config.batch_scale(batch_tokens)
    for group in groups.values():
        group["lr_mult"] = batch_scale * group.get("lr_mult", 1.0)
    return MixedOptimizer(
        [{"params": members[role], **group} for role, group in groups.items() if members[role]],
        orthogonalizer=orthogonalizer or Orthogonalizer(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)


def gradient_values(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The numbers of each gradient that there is: all of a dense one, the named rows of a sparse
    one.

    They share the gradient's memory. A sparse gradient is coalesced first, so that no row is named
    twice.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    return values


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    *,
    max_norm: float,
) -> float:
    """Scale all gradients so that their joint norm is at most `max_norm` (0: no clipping); returns
    the norm before.

    A norm that is not finite leaves the gradients alone: the caller decides, and no NaN is spread
    by a scale.
    """
    gradients = gradient_values(parameters)
    total = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    if max_norm and math.isfinite(total) and total > max_norm:
        # Not max_norm / (total + eps) as in torch: afterwards the norm is max_norm exactly.
        torch._foreach_mul_(gradients, max_norm / total)
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
