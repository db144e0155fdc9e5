"""Memory-bound functions of a block, with gradients by hand.

Apart from matmuls a training step is memory-bound: eager torch reads x once for each square, mean,
root and product. These functions read it less often. A GPU and the compiler, which fuses better,
use torch's own operators.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.compat import cpu_capabilities, has_onednn_linear, onednn_linear

# With fewer rows a matmul is memory-bound, and oneDNN has more overhead than MKL.
MIN_ROWS = 64


def _is_eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x_XD: Tensor, weight_D: Tensor | None, epsilon: float | None) -> Tensor:
    """Divide x by the root of the mean of its squares, and multiply it by `weight_D`.

    "Root Mean Square Layer Normalization" (Zhang and Sennrich, 2019). An epsilon of None is the
    dtype's own (at least float32's), as in torch.
    """
    if not _is_eager_cpu(x_XD):
        return F.rms_norm(x_XD, x_XD.shape[-1:], weight_D, epsilon)
    if torch.is_grad_enabled():
        y_XD: Tensor = _RMSNorm.apply(x_XD, epsilon)  # type: ignore[no-untyped-call]
    else:  # for a few rows the call of a Function takes as long as its work
        y_XD = x_XD * _inverse_rms(x_XD, epsilon)
    return y_XD if weight_D is None else y_XD * weight_D


def _inverse_rms(x_XD: Tensor, epsilon: float | None) -> Tensor:
    dtype = torch.promote_types(x_XD.dtype, torch.float32)
    epsilon = torch.finfo(dtype).eps if epsilon is None else epsilon
    norm_X1: Tensor = torch.linalg.vector_norm(x_XD, dim=-1, keepdim=True, dtype=dtype)
    return norm_X1.square_().div_(x_XD.shape[-1]).add_(epsilon).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, epsilon: float | None) -> Tensor:
        scale_X1 = _inverse_rms(x_XD, epsilon)
        y_XD = x_XD * scale_X1
        ctx.save_for_backward(y_XD, scale_X1)
        return y_XD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        y_XD, scale_X1 = ctx.saved_tensors
        # The output does not depend on the length of x: remove the component along x.
        along_X1 = (grads[0] * y_XD).mean(-1, keepdim=True)
        return torch.addcmul(grads[0], y_XD, along_X1, value=-1).mul_(scale_X1), None


def squared_relu(x: Tensor, slope: float = 0.0) -> Tensor:
    """Return max(x, 0)^2, "Primer" (So et al., 2021); with a slope max(x, slope x)^2, which has a
    gradient everywhere: the code of OpenAI's contest "Parameter Golf" (2026), with 0.5."""
    # x times max(x, slope^2 x), twice which is the gradient.
    if not _is_eager_cpu(x):
        return x * F.leaky_relu(x, slope**2)
    y: Tensor = _SquaredReLU.apply(x, slope)  # type: ignore[no-untyped-call]
    return y


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        leaky = F.leaky_relu(x, slope**2)
        ctx.save_for_backward(leaky)
        return x * leaky

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (leaky,) = ctx.saved_tensors
        d_x: Tensor = grads[0] * leaky
        return d_x.mul_(2), None


def apply_rope(x_XTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate pair i of each vector, its elements i and i + E/2, by the angle whose cosine and sine
    are given at both elements."""
    if not _is_eager_cpu(x_XTE):
        first, second = x_XTE.chunk(2, dim=-1)
        return x_XTE * cos_TE + torch.cat([-second, first], dim=-1) * sin_TE
    if not torch.is_grad_enabled():
        return _rotate(x_XTE, cos_TE, sin_TE)
    y_XTE: Tensor = _ApplyRope.apply(x_XTE, cos_TE, sin_TE)  # type: ignore[no-untyped-call]
    return y_XTE


def _rotate(x_XTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    x_first, x_second = x_XTE.chunk(2, dim=-1)
    sin_first, sin_second = sin_TE.chunk(2, dim=-1)
    y_XTE = x_XTE * cos_TE
    y_first, y_second = y_XTE.chunk(2, dim=-1)
    y_first.addcmul_(x_second, sin_first, value=-1)
    y_second.addcmul_(x_first, sin_second)
    return y_XTE


class _ApplyRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        ctx.dtype = x_XTE.dtype
        return _rotate(x_XTE, cos_TE, sin_TE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_TE, sin_TE = ctx.saved_tensors
        # The inverse of a rotation is the rotation by the negative angle.
        return _rotate(grads[0], cos_TE, -sin_TE).to(ctx.dtype), None, None


def linear(x_XD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """Compute x W^T + b.

    In float32 on a CPU that is not Intel's oneDNN is faster than MKL, which F.linear calls
    (docs/explanation/speed.md).
    """
    has_many_rows = x_XD.numel() >= MIN_ROWS * x_XD.shape[-1]
    is_float32 = x_XD.dtype == weight_FD.dtype == torch.float32
    uses_onednn = has_many_rows and is_float32 and _is_eager_cpu(x_XD) and _prefers_onednn()
    if not uses_onednn or torch.is_autocast_enabled("cpu"):
        return F.linear(x_XD, weight_FD, bias_F)
    y_XF: Tensor = _Linear.apply(x_XD, weight_FD, bias_F)  # type: ignore[no-untyped-call]
    return y_XF


@lru_cache
def _prefers_onednn() -> bool:
    is_intel = str(cpu_capabilities().get("cpu_name", "")).startswith("Intel")
    return has_onednn_linear() and not is_intel


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_XD, weight_FD)
        ctx.has_bias = bias_F is not None
        return onednn_linear(x_XD, weight_FD, bias_F)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_XD, weight_FD = ctx.saved_tensors
        grad_XF = grads[0]
        d_x = onednn_linear(grad_XF, weight_FD.T) if ctx.needs_input_grad[0] else None
        # oneDNN would have to copy both factors into another layout, which costs what it gains.
        grad_NF = grad_XF.flatten(0, -2)
        d_weight = grad_NF.T @ x_XD.flatten(0, -2)
        d_bias = grad_NF.sum(0) if ctx.has_bias else None
        return d_x, d_weight, d_bias
