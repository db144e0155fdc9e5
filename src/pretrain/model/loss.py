"""The language-model loss: cross-entropy of the next token, summed in nats over valid targets.

The objective is to maximise sum_i log p(x_{i+1} | x_{i-k}, ..., x_i). A micro-batch comes in; the
sum of -log p and the number of valid targets go out. The training step divides once, by the number
of targets of all its micro-batches. The logits (N, V) of a micro-batch are never all stored:
`chunked_cross_entropy` is F.cross_entropy of hidden @ weight.T, with loss and gradients computed
chunk by chunk; tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.compat import uses_onednn
from pretrain.model.decoder import Decoder
from pretrain.model.dropout import DropoutRng
from pretrain.model.fused import linear, weight_gradient
from pretrain.model.mixture import Mixture

# Targets with this value are ignored: padding at the end of an evaluation.
IGNORE_INDEX = -100

# Bytes of a chunk's logits on a CPU, and number of logits of a chunk on a GPU. A compiled chunk
# needs memory for logits and gradients only, an eager one also for float32 intermediates.
CPU_CHUNK_BYTES = 1 << 23
GPU_CHUNK_LOGITS_COMPILED = 1 << 29
GPU_CHUNK_LOGITS_EAGER = 1 << 27
# A matmul with fewer rows spends its time on reading the head's weight.
MIN_CHUNK_ROWS = 512
# On a CPU the softmax works on blocks of this many logits, which stay in the cache of a core.
CPU_BLOCK_LOGITS = 1 << 20
# A row stride of exactly V can cause cache conflicts in MKL (1.4 times slower at V = 50,257), so
# rows are padded.
CPU_ROW_PADDING = 16
# Tensor cores need rows of a multiple of 64 numbers (V = 50,257 is odd).
GPU_ROW_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model whose distribution, at temperature 1, is the fraction `weight` of the target:
    "Distilling the Knowledge in a Neural Network" (Hinton et al., 2015)."""

    decoder: Decoder
    weight: float

    @torch.no_grad()
    def read(self, ids_BT: Tensor) -> Callable[..., None]:
        """Return `mix_target_` for the positions of a micro-batch."""
        return partial(self.mix_target_, self.decoder.forward(ids_BT).flatten(0, 1))

    def mix_target_(
        self, hidden_ND: Tensor, rows: slice, grad_NV: Tensor, targets_N: Tensor, smoothing: float
    ) -> None:
        """Mix this distribution into the target of some rows of a gradient by logits, in place."""
        logits_NV = self.decoder.logits(hidden_ND[rows])
        p_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).softmax(-1)
        grad_NV.sub_(p_NV - smoothing / p_NV.shape[1], alpha=self.weight)
        one_hot_N1 = grad_NV.new_full((len(grad_NV), 1), self.weight * (1 - smoothing))
        grad_NV.scatter_add_(1, targets_N.clamp(min=0)[:, None], one_hot_N1)


class LMLoss(nn.Module):
    """The decoder and its loss: the module that is compiled, sharded and trained.

    A batch has `inputs`, ids (B, T), `targets`, the next id of each input (B, T) or IGNORE_INDEX,
    and `samples`, the global numbers of its rows (B). `seed` is that of the dropout masks. Dropout,
    `label_smoothing`, `z_loss` and the `teacher` are used in training mode only; the last three
    change the gradients and never the value.
    """

    def __init__(
        self, decoder: Decoder, *, seed: int = 0, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> None:
        super().__init__()
        self.decoder, self.seed = decoder, seed
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.teacher: Teacher | None = None
        # Tensor parallelism replaces this function by one for a sharded head.
        self.cross_entropy: Callable[..., Tensor] = chunked_cross_entropy

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the sum of -log p(target | context) in nats, and the number of valid targets."""
        hidden_BTD = self.decoder(batch.inputs, dropout_rng=self.dropout_rng(batch))
        targets_N = batch.targets.flatten()
        if isinstance(self.decoder, Mixture):
            nats = nats_of_mixture(self.decoder, hidden_BTD.flatten(0, 1), targets_N)
            return nats, (targets_N != IGNORE_INDEX).sum()
        teacher = self.teacher if self.training else None
        extra = {} if teacher is None else {"mix_target_": teacher.read(batch.inputs)}
        nats = self.cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.decoder.head_weight,
            targets_N,
            smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0,
            **extra,
        )
        return nats, (targets_N != IGNORE_INDEX).sum()

    def dropout_rng(self, batch: Any) -> DropoutRng | None:
        """Return the source of a micro-batch's dropout masks; None if nothing is dropped."""
        has_dropout = self.decoder.config.dropout > 0 or self.decoder.config.table_dropout > 0
        return DropoutRng(self.seed, batch.samples) if self.training and has_dropout else None

    def compile_parts(self, *, by_block: bool = False) -> None:
        """Compile the decoder, or each of its blocks, and the loss, for batches of one shape."""
        self.cross_entropy = partial(chunked_cross_entropy, compiled=True)
        for module in self.decoder.blocks.values() if by_block else [self.decoder]:
            module.compile(dynamic=False)


@torch.no_grad()
def nats_of_mixture(mixture: Mixture, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return the summed cross-entropy (a scalar, nats) of a mixture, chunk by chunk."""
    chunks = zip(
        *(torch.split(each, MIN_CHUNK_ROWS) for each in (hidden_ND, targets_N)), strict=True
    )
    nats = [
        F.cross_entropy(mixture.logits(hidden), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        for hidden, targets in chunks
    ]
    return torch.stack(nats).sum()


def chunked_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    compiled: bool = False,
    mix_target_: Callable[..., None] | None = None,
) -> Tensor:
    """Return the summed cross-entropy (a scalar, nats) of logits = hidden @ weight.T.

    Both gradients are computed here, chunk by chunk, while a chunk's logits exist.

    With label `smoothing` the value stays the plain cross-entropy, so that all reported losses can
    be compared; the gradient is that of a target distribution with 1 - smoothing on the target and
    the rest spread evenly over the vocabulary: "Rethinking the Inception Architecture for Computer
    Vision" (Szegedy et al., 2016). Likewise the gradient alone contains `z_loss` times the squared
    log of the softmax's sum: "PaLM" (Chowdhery et al., 2022), and what `mix_target_` changes.
    `compiled`: fuse the softmax by torch's compiler on a GPU; without effect on a CPU.
    """
    device, V = hidden_ND.device, weight_VD.shape[0]
    if torch.is_autocast_enabled(device.type):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device.type))
    needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    # A float64 sum hardly depends on how rows are grouped. MPS has no float64.
    sum_dtype = torch.float32 if device.type == "mps" else torch.float64
    options = (V, smoothing, z_loss, sum_dtype)

    with torch.no_grad():
        nats = torch.zeros((), dtype=sum_dtype, device=device)
        d_hidden_ND = torch.empty_like(hidden_ND) if needs_grad else None
        d_weight_VD = torch.zeros_like(weight_VD) if needs_grad else None
        weight = weight_VD.to(hidden_ND.dtype)
        rows = _chunk_rows(hidden_ND, V, compiled=compiled and needs_grad)
        in_blocks = uses_cpu_path(device)
        if in_blocks:
            block_rows = min(rows, max(1, CPU_BLOCK_LOGITS // V))
            logits_buffer = _padded_rows(rows, V, like=weight)
            workspace_2BV = weight.new_empty((2, block_rows, V), dtype=weight_VD.dtype)
        else:
            weight = F.pad(weight, (0, 0, 0, _round_up(V, GPU_ROW_MULTIPLE) - V))

        for start in range(0, len(hidden_ND), rows):
            chunk = slice(start, start + rows)
            hidden, targets = hidden_ND[chunk], targets_N[chunk]
            if in_blocks:
                chunk_nats = torch.zeros((), dtype=sum_dtype, device=device)
                logits_NV = _logits(hidden, weight, logits_buffer)
                for first in range(0, len(hidden), block_rows):
                    block = slice(first, first + block_rows)
                    block_nats, block_grad = nats_and_grad(
                        logits_NV[block], targets[block], *options, workspace_2BV
                    )
                    chunk_nats += block_nats
                    logits_NV[block] = block_grad
                grad_NV = logits_NV
                del logits_NV
            else:
                function = _compiled_nats_and_grad() if compiled else nats_and_grad
                chunk_nats, grad_NV = function(hidden @ weight.T, targets, *options)
            nats += chunk_nats

            if d_hidden_ND is not None and d_weight_VD is not None:
                if mix_target_ is not None:
                    mix_target_(chunk, grad_NV[:, :V], targets, smoothing)
                # Ignored rows are set to 0 in the matrices of width D, which is less than V.
                grad_NV = grad_NV.to(hidden.dtype)
                is_valid_N1 = (targets != IGNORE_INDEX)[:, None]
                torch.mul(linear(grad_NV, weight.T, None), is_valid_N1, out=d_hidden_ND[chunk])
                _add_weight_gradient(d_weight_VD, grad_NV, hidden * is_valid_N1)
            del grad_NV  # before the next chunk allocates its own

    if d_hidden_ND is None or d_weight_VD is None:
        return nats
    return attach_grad(hidden_ND, weight_VD, nats, d_hidden_ND, d_weight_VD)


def _logits(hidden_ND: Tensor, weight_VD: Tensor, buffer_NV: Tensor) -> Tensor:
    if uses_onednn(hidden_ND, weight_VD):
        return linear(hidden_ND, weight_VD, None)
    return torch.mm(hidden_ND, weight_VD.T, out=buffer_NV[: len(hidden_ND)])


def _add_weight_gradient(total_VD: Tensor, grad_NV: Tensor, hidden_ND: Tensor) -> None:
    if hidden_ND.dtype == total_VD.dtype and grad_NV.shape[1] == len(total_VD):
        weight_gradient(grad_NV, hidden_ND, total_VD)
    else:  # of another dtype, or with columns of padding
        total_VD += (grad_NV.T @ hidden_ND)[: len(total_VD)]


def nats_and_grad(
    logits_NP: Tensor,
    targets_N: Tensor,
    V: int,
    smoothing: float,
    z_loss: float,
    sum_dtype: torch.dtype,
    workspace_2BV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of some rows and its gradient by their logits.

    The first V of P columns are logits, the rest is padding. With a workspace, of the dtype in
    which the softmax is computed, nothing of size (N, V) is allocated, and the gradient is a view
    of it. Without one the gradient has the dtype of the logits.
    """
    is_valid_N1 = (targets_N != IGNORE_INDEX)[:, None]
    target_N1 = targets_N.clamp(min=0)[:, None]

    if workspace_2BV is not None:
        logits, p = workspace_2BV[:, : len(logits_NP)].unbind()
        logits.copy_(logits_NP)
        torch.softmax(logits, 1, out=p)
        p_target_N1 = p.gather(1, target_N1)
        log_p_N1 = p_target_N1.log()
        if _any_underflow(p_target_N1):
            log_p_N1 = logits.gather(1, target_N1) - logits.logsumexp(1, keepdim=True)
        log_sum_N1 = logits.gather(1, target_N1) - log_p_N1
    else:
        logits = logits_NP.to(torch.promote_types(logits_NP.dtype, torch.float32))
        if logits.shape[1] > V:
            is_padding_P = torch.arange(logits.shape[1], device=logits.device) >= V
            logits = logits.masked_fill(is_padding_P, float("-inf"))
        log_sum_N1 = logits.logsumexp(1, keepdim=True)
        log_p_N1 = logits_NP.gather(1, target_N1).to(logits.dtype) - log_sum_N1
        p = (logits - log_sum_N1).exp()

    nats = -torch.where(is_valid_N1, log_p_N1, 0).sum(dtype=sum_dtype)
    grad = softmax_grad_(p, target_N1, log_sum_N1, vocab_size=V, smoothing=smoothing, z_loss=z_loss)
    return nats, grad.to(logits_NP.dtype) if workspace_2BV is None else grad


def softmax_grad_(
    p_NV: Tensor,
    target_N1: Tensor,
    log_sum_N1: Tensor,
    *,
    vocab_size: int,
    smoothing: float,
    z_loss: float,
    has_target_N1: Tensor | None = None,
) -> Tensor:
    """Turn the softmax into the gradient of the nats by the logits, in place; returns it.

        grad = (1 + 2 z_loss log_sum) softmax - (1 - smoothing) one_hot - smoothing / vocab_size

    `log_sum` is the log of the sum of exp(logits). Where a process has some columns of the softmax
    only, `has_target_N1` is True in the rows whose target is among them.
    """
    if z_loss:
        p_NV *= 1 + 2 * z_loss * log_sum_N1

    if torch.compiler.is_compiling():
        # The compiler fuses a comparison with the rest; a scatter would be one more kernel.
        is_target_NV = torch.arange(p_NV.shape[1], device=p_NV.device) == target_N1
        p_NV = torch.where(is_target_NV, p_NV - (1.0 - smoothing), p_NV)
    else:
        minus_one_hot_N1 = torch.full_like(log_sum_N1, smoothing - 1.0)
        if has_target_N1 is not None:
            minus_one_hot_N1 *= has_target_N1
        p_NV.scatter_add_(1, target_N1, minus_one_hot_N1)

    if smoothing:
        p_NV[:, :vocab_size] -= smoothing / vocab_size
    return p_NV


@cache
def _compiled_nats_and_grad() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(nats_and_grad, dynamic=False)


class _AttachGrad(torch.autograd.Function):
    """Return the nats with their gradients by hidden states x and head weight w, computed
    already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, nats: Tensor, d_x: Tensor, d_w: Tensor) -> Tensor:
        ctx.save_for_backward(d_x, d_w)
        return nats.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_x, d_w), d_nats = ctx.saved_tensors, grads[0]
        return d_x * d_nats.to(d_x.dtype), d_w * d_nats.to(d_w.dtype), None, None, None


attach_grad: Callable[..., Tensor] = _AttachGrad.apply


def uses_cpu_path(device: torch.device) -> bool:
    """Return whether the softmax is computed in blocks that fit a CPU's cache."""
    return device.type == "cpu"


def _chunk_rows(hidden_ND: Tensor, V: int, *, compiled: bool) -> int:
    """Return the rows of a chunk, on a GPU a power of 2: the compiler wants chunks of one shape."""
    if uses_cpu_path(hidden_ND.device):
        rows = max(MIN_CHUNK_ROWS, CPU_CHUNK_BYTES // hidden_ND.element_size() // V)
    else:
        n_logits = GPU_CHUNK_LOGITS_COMPILED if compiled else GPU_CHUNK_LOGITS_EAGER
        rows = max(MIN_CHUNK_ROWS, n_logits // V)
        rows = 1 << (rows.bit_length() - 1)
    return max(1, min(rows, len(hidden_ND)))


def _padded_rows(n: int, V: int, *, like: Tensor) -> Tensor:
    """Allocate n rows of V numbers with padding in between.

    The padding is 0: oneDNN's bfloat16 matmuls multiply some of it by 0, which must not give NaN.
    """
    buffer = like.new_empty(n, _round_up(V, CPU_ROW_PADDING) + CPU_ROW_PADDING)
    buffer[:, V:] = 0
    return buffer[:, :V]


def _round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def _any_underflow(p_N1: Tensor) -> bool:
    """Return whether a probability is too small for its dtype, while its logarithm is not."""
    return bool((p_N1 < torch.finfo(p_N1.dtype).tiny).any())
