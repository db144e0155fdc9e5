"""Small functions of a block in fewer passes over memory, with their gradients by hand.

Outside of its matrix products a step is a walk through memory, and torch's own functions, without a
compiler, walk once for each square, mean, root and product. Each function here has a plain twin
(`plain_...`), which is what a compiler gets to see, since it fuses better, and what a GPU runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.compat import has_onednn_linear, onednn_linear

# Of fewer rows a product is bound by memory, and oneDNN has more to prepare than MKL.
FEWEST_ROWS = 64


def _is_fused(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x_XD: Tensor, weight_D: Tensor | None, epsilon: float | None) -> Tensor:
    """x over the root of the mean of its squares, times `weight_D`: "Root Mean Square Layer
    Normalization" (Zhang and Sennrich, 2019). An epsilon of None is float32's, or float64's own,
    as in torch."""
    if not _is_fused(x_XD):
        return plain_rms_norm(x_XD, weight_D, epsilon)
    if torch.is_grad_enabled():
        normed: Tensor = _RMSNorm.apply(x_XD, epsilon)  # type: ignore[no-untyped-call]
    else:  # A Function takes as long as what it does to a few rows.
        normed = x_XD * _inverse_root_mean_square(x_XD, epsilon)
    return normed if weight_D is None else normed * weight_D


def plain_rms_norm(x_XD: Tensor, weight_D: Tensor | None, epsilon: float | None) -> Tensor:
    return F.rms_norm(x_XD, x_XD.shape[-1:], weight_D, epsilon)


def _inverse_root_mean_square(x_XD: Tensor, epsilon: float | None) -> Tensor:
    exact = torch.promote_types(x_XD.dtype, torch.float32)
    epsilon = torch.finfo(exact).eps if epsilon is None else epsilon
    norm_X1: Tensor = torch.linalg.vector_norm(x_XD, dim=-1, keepdim=True, dtype=exact)
    return norm_X1.square_().div_(x_XD.shape[-1]).add_(epsilon).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, epsilon: float | None) -> Tensor:
        scale_X1 = _inverse_root_mean_square(x_XD, epsilon)
        normed_XD = x_XD * scale_X1
        ctx.save_for_backward(normed_XD, scale_X1)
        return normed_XD

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        normed_XD, scale_X1 = ctx.saved_tensors
        # What would only make x longer or shorter is taken out of the slope.
        along_X1 = (slopes[0] * normed_XD).mean(-1, keepdim=True)
        return torch.addcmul(slopes[0], normed_XD, along_X1, value=-1).mul_(scale_X1), None


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2: "Primer" (So et al., 2021)."""
    if not _is_fused(x):
        return plain_squared_relu(x)
    squared: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
    return squared


def plain_squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        slope: Tensor = slopes[0] * positive
        return slope.mul_(2)


def rotate(x_XTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Pair i of each vector, its elements i and i + E/2, turned by the angle whose cosine and sine
    stand at both places."""
    if not _is_fused(x_XTE):
        return plain_rotate(x_XTE, cos_TE, sin_TE)
    if not torch.is_grad_enabled():
        return _turned(x_XTE, cos_TE, sin_TE)
    turned: Tensor = _Rotation.apply(x_XTE, cos_TE, sin_TE)  # type: ignore[no-untyped-call]
    return turned


def plain_rotate(x_XTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    first, second = x_XTE.chunk(2, dim=-1)
    return x_XTE * cos_TE + torch.cat([-second, first], dim=-1) * sin_TE


def _turned(x_XTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    turned = x_XTE * cos_TE
    (into_first, into_second), (first, second) = turned.chunk(2, -1), x_XTE.chunk(2, -1)
    sin_first, sin_second = sin_TE.chunk(2, -1)
    into_first.addcmul_(second, sin_first, value=-1)
    into_second.addcmul_(first, sin_second)
    return turned


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        ctx.dtype = x_XTE.dtype
        return _turned(x_XTE, cos_TE, sin_TE)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        cos_TE, sin_TE = ctx.saved_tensors
        return _turned(slopes[0], cos_TE, -sin_TE).to(ctx.dtype), None, None  # turned back


def linear(x_XD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """x W^T + b, in float32 on a CPU that is not Intel's by oneDNN, which comes with torch and is
    faster there than the MKL that torch's own function calls (docs/explanation/speed.md)."""
    is_large = x_XD.numel() >= FEWEST_ROWS * x_XD.shape[-1]
    is_float32 = x_XD.dtype == weight_FD.dtype == torch.float32
    if not (
        is_large and is_float32 and _is_fused(x_XD) and _takes_onednn()
    ) or torch.is_autocast_enabled("cpu"):
        return F.linear(x_XD, weight_FD, bias_F)
    product: Tensor = _Linear.apply(x_XD, weight_FD, bias_F)  # type: ignore[no-untyped-call]
    return product


@lru_cache
def _takes_onednn() -> bool:
    # Releases before torch 2.13 do not say whose processor it is.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_intels = str(known.get("cpu_name", "")).startswith("Intel")
    return has_onednn_linear() and not is_intels


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_XD, weight_FD)
        ctx.has_bias = bias_F is not None
        return onednn_linear(x_XD, weight_FD, bias_F)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x_XD, weight_FD), slope_XF = ctx.saved_tensors, slopes[0]
        d_x = onednn_linear(slope_XF, weight_FD.T) if ctx.needs_input_grad[0] else None
        # Both sides would have to be laid out anew for oneDNN, which costs what it gains.
        slope_NF = slope_XF.flatten(0, -2)
        d_weight = slope_NF.T @ x_XD.flatten(0, -2)
        return d_x, d_weight, slope_NF.sum(0) if ctx.has_bias else None
