"""Memory-bound functions of a block, with gradients by hand.

Apart from matmuls a training step is memory-bound: eager torch reads x once for each square, mean,
root and product. These functions read it less often. A GPU and the compiler, which fuses better,
use torch's own operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.compat import is_eager_cpu, onednn_linear, softmax_gradient, uses_onednn

# oneDNN copies rows of at most this many numbers, 4 MB, at once, but no fewer than these rows.
COPIED_NUMBERS, MIN_COPIED_ROWS = 1 << 20, 256
# Queries of a block of attention, and those of the longest context that is computed by blocks.
QUERIES, MOST_QUERIES = 128, 512


def rms_norm(x_XD: Tensor, weight_D: Tensor | None, epsilon: float | None) -> Tensor:
    """Divide x by the root of the mean of its squares, and multiply it by `weight_D`.

    "Root Mean Square Layer Normalization" (Zhang and Sennrich, 2019). An epsilon of None is the
    dtype's own (at least float32's), as in torch.
    """
    if not is_eager_cpu(x_XD):
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


def squared_relu(x: Tensor, leak: float = 0.0) -> Tensor:
    """Return max(x, 0)^2, "Primer" (So et al., 2021); with a leak max(x, leak x)^2, which has a
    gradient everywhere: the code of OpenAI's contest "Parameter Golf" (2026), with 0.5."""
    # x times max(x, leak^2 x), twice which is the gradient.
    if not is_eager_cpu(x):
        return x * F.leaky_relu(x, leak**2)
    y: Tensor = _SquaredReLU.apply(x, leak)  # type: ignore[no-untyped-call]
    return y


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, leak: float) -> Tensor:
        leaky = F.leaky_relu(x, leak**2)
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
    if not is_eager_cpu(x_XTE):
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


def prefers_causal_attention(query_BHTE: Tensor) -> bool:
    """Return whether `causal_attention` is faster than torch's kernel: in bfloat16, in training on
    a CPU, for a context whose weights (T, T) are not much memory."""
    is_trained = torch.is_grad_enabled() and query_BHTE.requires_grad and is_eager_cpu(query_BHTE)
    is_bfloat16 = query_BHTE.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return is_trained and is_bfloat16 and 1 < query_BHTE.shape[2] <= MOST_QUERIES


def causal_attention(query_BHTE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor) -> Tensor:
    """Compute causal attention (B, H, T, E) by products of blocks of queries and the keys before
    them, which are several times as fast for all heads at once as in torch's kernel."""
    qkv = [query_BHTE, key_BHTE, value_BHTE]
    if torch.is_autocast_enabled("cpu"):
        qkv = [each.to(torch.get_autocast_dtype("cpu")) for each in qkv]
    y_BHTE: Tensor = _CausalAttention.apply(*qkv)  # type: ignore[no-untyped-call]
    return y_BHTE


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *qkv_BHTE: Tensor) -> Tensor:
        B, H, T, E = ctx.shape = qkv_BHTE[0].shape
        q, k, v = (each.reshape(B * H, T, E) for each in qkv_BHTE)
        y_BTHE, weights = q.new_empty(B, T, H, E), []
        for start in range(0, T, QUERIES):
            stop = min(start + QUERIES, T)
            mask = q.new_full((stop - start, stop), float("-inf")).triu_(start + 1)
            scores = torch.baddbmm(mask, q[:, start:stop], k[:, :stop].mT, alpha=E**-0.5)
            weights.append(scores.softmax(-1))
            y = weights[-1] @ v[:, :stop]
            y_BTHE[:, start:stop].transpose(1, 2).copy_(y.view(B, H, -1, E))
        ctx.save_for_backward(q, k, v, *weights)
        return y_BTHE.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *weights = ctx.saved_tensors
        B, H, T, E = ctx.shape
        grad = grads[0].reshape(B * H, T, E)
        d_q = q.new_empty(B, T, H, E).transpose(1, 2)
        # Sums over blocks of queries, of which the last has all keys.
        dtype = torch.promote_types(q.dtype, torch.float32)
        d_k, d_v = q.new_empty(2, B, T, H, E, dtype=dtype).transpose(2, 3)
        for p in reversed(weights):
            start, stop = p.shape[2] - p.shape[1], p.shape[2]
            d_p = grad[:, start:stop] @ v[:, :stop].mT
            d_scores = softmax_gradient(d_p, p).mul_(E**-0.5)
            d_q[:, :, start:stop] = (d_scores @ k[:, :stop]).view(B, H, -1, E)
            for total, a, b in ((d_k, d_scores, q), (d_v, p, grad)):
                part = (a.mT @ b[:, start:stop]).view(B, H, -1, E)
                if stop == T:
                    total.copy_(part)
                else:
                    total[:, :, :stop] += part
        return d_q, d_k.to(q.dtype), d_v.to(q.dtype)


def linear(x_XD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """Compute x W^T + b.

    In float32 on a CPU that is not Intel's oneDNN is faster than MKL, which F.linear calls
    (docs/explanation/speed.md).
    """
    if not uses_onednn(x_XD, weight_FD):
        return F.linear(x_XD, weight_FD, bias_F)
    if not torch.is_grad_enabled():
        return onednn_linear(x_XD, weight_FD, bias_F)
    y_XF: Tensor = _Linear.apply(x_XD, weight_FD, bias_F)  # type: ignore[no-untyped-call]
    return y_XF


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
        grad_NF = grad_XF.flatten(0, -2)
        d_weight = weight_gradient(grad_NF, x_XD.flatten(0, -2))
        d_bias = grad_NF.sum(0) if ctx.has_bias else None
        return d_x, d_weight, d_bias


def weight_gradient(grad_NF: Tensor, x_ND: Tensor, total_FD: Tensor | None = None) -> Tensor:
    """Compute y^T x, the gradient by the weight of a linear layer with inputs x, or add it to a
    total in place."""
    # oneDNN copies both factors into another layout, which costs what it gains without AVX-512.
    if not uses_onednn(grad_NF, x_ND) or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return grad_NF.T @ x_ND if total_FD is None else total_FD.addmm_(grad_NF.T, x_ND)
    is_wide = grad_NF.shape[1] > x_ND.shape[1]  # the first factor takes longer to copy
    if total_FD is None:
        total_FD = grad_NF.new_zeros(grad_NF.shape[1], x_ND.shape[1])
    rows = max(MIN_COPIED_ROWS, COPIED_NUMBERS // max(total_FD.shape))
    parts = (torch.split(each, rows) for each in (grad_NF, x_ND))
    for grad, x in zip(*parts, strict=True):
        total_FD += onednn_linear(x.T, grad.T).T if is_wide else onednn_linear(grad.T, x.T)
    return total_FD
