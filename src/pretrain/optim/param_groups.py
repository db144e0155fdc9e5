"""One optimizer with a rule for each group of parameters, and a state addressed by parameter name.

The rules: AdamW, "Decoupled Weight Decay Regularization" (Loshchilov and Hutter, 2019), in torch's
fused implementation; Muon (`muon`) for hidden matrices; row-wise Adagrad for lookup tables. Also
here: the norm and the clipping of gradients, dense and sparse.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.compat import without_compiler_guard
from pretrain.optim.config import OptimizerConfig
from pretrain.optim.muon import Orthogonalizer, muon_update

# Rows of a lookup table are read rarely, so they take a higher learning rate.
LOOKUP_LR_MULT = 4.0
# Without this prior, Adagrad's first update of a row has full size regardless of its gradient. It
# is the initial mean square of the gradient of a loss that is summed over targets.
INITIAL_SQUARE = 2.0
ADAGRAD_EPSILON = 1e-10
# A state of a parameter: its average, or itself while a model, as in checkpoints, has the average.
AVERAGE = "average"


class MixedOptimizer(torch.optim.AdamW):
    """AdamW, with other rules for the groups whose `rule` is muon or adagrad."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, orthogonalizer: Orthogonalizer, **defaults: Any
    ) -> None:
        super().__init__([{"rule": "adamw", **group} for group in groups], **defaults)
        self._orthogonalizer = orthogonalizer

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters; gradients of other rules than AdamW's are None afterwards."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            match group["rule"]:
                case "adamw":
                    continue
                case "muon":
                    by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
                    for parameter in parameters:
                        by_shape[self._orthogonalizer.full_shape(parameter)].append(parameter)
                    options = {
                        k: group[k] for k in ("lr", "momentum", "weight_decay", "row_norm", "dtype")
                    }
                    for same_shape in by_shape.values():
                        muon_update(
                            same_shape,
                            [self._state_of(p, "momentum", p.shape) for p in same_shape],
                            [p.grad for p in same_shape if p.grad is not None],
                            orthogonalizer=self._orthogonalizer,
                            **options,
                        )
                case "adagrad":
                    initial = group["initial_square"]
                    for parameter in parameters:
                        squares = self._state_of(parameter, "squares", parameter.shape[:1], initial)
                        adagrad_update(parameter, squares, parameter.grad, lr=group["lr"])
                case unknown:
                    raise AssertionError(f"no code for the rule {unknown!r} of a group")
            for parameter in parameters:
                parameter.grad = None
        # AdamW skips parameters without a gradient.
        return without_compiler_guard(torch.optim.AdamW.step)(self, closure)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        without_compiler_guard(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        without_compiler_guard(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    def _state_of(
        self, parameter: nn.Parameter, kind: str, shape: torch.Size, initial: float = 0.0
    ) -> Tensor:
        state = self.state[parameter]
        if kind not in state:
            state[kind] = parameter.new_full(shape, initial)
        tensor: Tensor = state[kind]
        return tensor


@torch.no_grad()
def adagrad_update(table_RD: Tensor, squares_R: Tensor, gradient: Tensor, *, lr: float) -> None:
    """Update a lookup table, of which a step reads few rows, and its state, in place.

    For row r with gradient g: s_r <- s_r + mean(g^2), row <- row - lr g / (sqrt(s_r) + epsilon).
    "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization" (Duchi et al.,
    2011) with one sum for a row, as in "Deep Learning Recommendation Model" (Naumov et al., 2019).
    The gradient is dense (R, D), or sparse and coalesced, which is exact: a row with gradient 0
    keeps its values and its state.
    """
    if gradient.is_sparse:
        rows_N, grad_ND = gradient.indices()[0], gradient.values()
    else:
        rows_N, grad_ND = torch.arange(len(table_RD), device=table_RD.device), gradient
    squares_N = squares_R[rows_N] + grad_ND.square().mean(1)
    squares_R.index_copy_(0, rows_N, squares_N)
    scale_N1 = (squares_N.sqrt() + ADAGRAD_EPSILON)[:, None]
    table_RD.index_add_(0, rows_N, grad_ND / scale_N1, alpha=-lr)


def role_of(name: str, parameter: nn.Parameter) -> str:
    """Return the group of a parameter, by its name with or without a prefix.

    The groups are lookup (an n-gram table), embedding, head, vector (a norm or bias), and hidden (a
    matrix from hidden to hidden states).
    """
    *path, _ = name.split(".")
    if parameter.ndim < 2:
        return "vector"
    if "ngrams" in path:
        return "lookup"
    if "embedding" in name:
        return "embedding"
    return "head" if "head" in path else "hidden"


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    config: OptimizerConfig,
    width: int | None = None,
    batch_tokens: int = 8192,
    precision: str = "fp32",
    orthogonalizer: Orthogonalizer | None = None,
) -> MixedOptimizer:
    """Build the optimizer over named parameters, with a group for each role (`role_of`).

    `width` is the model's d_model, needed if the config has a base_width. Gradients are means over
    `batch_tokens` targets; with a base_batch_tokens the learning rates are scaled to them. Muon's
    matmuls are in `precision`. Vectors and lookup tables have no weight decay.
    """
    uses_muon = config.name == "muon"
    # The learning rate is Muon's; what AdamW updates in the same run takes multiples of it.
    embedding_lr_mult = config.embedding_lr_mult if uses_muon else 1.0
    head_lr_mult = config.head_lr_mult if uses_muon else 1.0
    width_scale, batch_scale = config.width_scale(width), config.batch_scale(batch_tokens)
    groups: dict[str, dict[str, Any]] = {
        "hidden": {
            "lr_mult": batch_scale * width_scale,
            "rule": config.name,
            "momentum": config.momentum,
            "row_norm": config.row_norm,
            "dtype": torch.bfloat16 if precision == "bf16" else torch.float32,
        },
        "embedding": {"lr_mult": batch_scale * embedding_lr_mult},
        "head": {"lr_mult": batch_scale * (head_lr_mult * width_scale)},
        "vector": {"lr_mult": batch_scale, "weight_decay": 0.0},
        "lookup": {
            "rule": "adagrad",
            "lr_mult": batch_scale * (LOOKUP_LR_MULT * embedding_lr_mult),
            "initial_square": INITIAL_SQUARE / batch_tokens**2,
            "weight_decay": 0.0,
        },
    }
    members: dict[str, list[nn.Parameter]] = {role: [] for role in groups}
    for name, parameter in parameters:
        role = role_of(name, parameter)
        # All processes take part in exchanging Muon's matrices, also with an empty shard.
        if parameter.numel() or groups[role].get("rule") == "muon":
            members[role].append(parameter)
    return MixedOptimizer(
        [{"params": members[role], **group} for role, group in groups.items() if members[role]],
        orthogonalizer=orthogonalizer or Orthogonalizer(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group to `lr` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


@torch.no_grad()
def update_averages(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """After an update, set the average a of each parameter p to decay a + (1 - decay) p; the first
    one is the parameter itself."""
    for parameter, state in optimizer.state.items():
        if AVERAGE in state:
            state[AVERAGE].lerp_(parameter, 1 - decay)
        elif state:  # not of a parameter without an update: AdamW begins with an empty state
            state[AVERAGE] = parameter.detach().clone()


@torch.no_grad()
def swap_averages(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> None:
    """Exchange all parameters and their averages, bit for bit; then forget these unless `keep`."""
    for parameter, state in optimizer.state.items():
        if AVERAGE in state:
            value = parameter.detach().clone()
            parameter.copy_(state.pop(AVERAGE))
            if keep:
                state[AVERAGE] = value


def gradient_values(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the values of all gradients, as views: of a sparse one, those of its rows.

    Sparse gradients are coalesced first, so that each row is there once.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    return values


def clip_gradients(
    parameters: Iterable[nn.Parameter], *, max_norm: float, norm: float | None = None
) -> float:
    """Scale all gradients so that their joint norm is at most `max_norm` (0: no clipping).

    Returns the norm before; `norm` is given where other processes have some of the gradients. If it
    is not finite the gradients stay as they are.
    """
    gradients = gradient_values(parameters)
    if norm is None:
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    if max_norm and math.isfinite(norm) and norm > max_norm:
        # Not max_norm / (norm + eps) as in torch: afterwards the norm is exactly max_norm.
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named PARAMETER/KIND, for a checkpoint."""
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
    """Set the optimizer's state from the tensors of `optimizer_state`."""
    by_name = dict(parameters)
    for full_name, value in tensors.items():
        name, kind = full_name.rsplit("/", 1)
        optimizer.state[by_name[name]][kind] = value
