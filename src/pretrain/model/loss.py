"""The objective: maximise L(X) = sum_i log p(x_{i+1} | x_{i-k}, ..., x_i), as a sum of nats and a
count.

A micro-batch goes in; the sum of -log p over its targets and the number of those targets come out.
The division happens once, over everything that a step saw, and not here. Whole logits are never
kept: the loss walks over the rows in chunks and makes both gradients on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.model.decoder import Decoder
from pretrain.model.random import DropoutRng

# A target of -100 is not counted: padding at the end of an evaluation.
IGNORE_INDEX = -100
# Room of the logits that exist at once, or their number, and the rows that are taken all the same:
# products of fewer rows than that walk through the whole head for little.
CHUNK_BYTES = {"cpu": 1 << 23}
# On a GPU, where a compiler keeps all but logits and slopes within the chip, and where it does not.
CHUNK_LOGITS_COMPILED, CHUNK_LOGITS_EAGER = 1 << 29, 1 << 27
LEAST_ROWS = 512
# What is done to each logit is done to so many at a time, which stay in a CPU core's cache.
BLOCK_LOGITS = {"cpu": 1 << 20}
# Rows of exactly V numbers may lie so that their beginnings drive each other out of the cache: MKL
# then takes 1.4 times as long (V 50,257). Rows of a few numbers more do not.
ROW_PADDING = 16
# A GPU's fast products want rows of a multiple of so many numbers (V 50,257 is odd).
ROW_MULTIPLE = 64
# Nats of some rows, and the slope of the objective by their logits, from logits and targets.
_Slope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Batch(Protocol):
    """What the objective reads of a micro-batch."""

    @property
    def inputs(self) -> Tensor:
        """Ids (B, T)."""

    @property
    def targets(self) -> Tensor:
        """The id that follows each input (B, T), or NOT_COUNTED."""

    @property
    def samples(self) -> Tensor:
        """The global number of each row's window (B)."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target], chunk by chunk, with gradients made in
    forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        smoothing: float,
        z_loss: float,
        compiled: bool,
        learns: bool,
    ) -> Tensor:
        # The sum is kept in float64 where there is one, so that it hardly depends on how rows are
        # grouped.
        total_type = torch.float32 if hidden_ND.device.type == "mps" else torch.float64
        nats = torch.zeros((), dtype=total_type, device=hidden_ND.device)
        # What is needed says nothing of whether anybody will go back.
        with_gradients = learns and any(ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden_ND) if with_gradients else None
        d_weight = torch.zeros_like(weight_VD) if with_gradients else None
        V, how = weight_VD.shape[0], (smoothing, z_loss, total_type)
        weight = weight_VD.to(hidden_ND.dtype)
        rows = _rows_at_once(hidden_ND, V, compiled=compiled and with_gradients)
        if hidden_ND.device.type in BLOCK_LOGITS:
            slope_of = _slopes_by_block(weight, rows, weight_VD.dtype, *how)
        else:
            # Columns beyond V have no probability and no slope.
            weight = F.pad(weight, (0, 0, 0, -V % ROW_MULTIPLE))
            slope_of = _slopes_at_once(weight, V, *how, compiled=compiled)
        for start in range(0, hidden_ND.shape[0], rows):
            hidden, targets = hidden_ND[start : start + rows], targets_N[start : start + rows]
            chunk_nats, slope_NV = slope_of(hidden, targets)
            nats += chunk_nats
            if d_hidden is not None and d_weight is not None:
                slope_NV = slope_NV.to(hidden.dtype)
                # Rows that do not count are struck out where they are narrow.
                counted_N1 = (targets != IGNORE_INDEX)[:, None]
                torch.mul(slope_NV @ weight, counted_N1, out=d_hidden[start : start + rows])
                counted_hidden = hidden * counted_N1
                if hidden.dtype == d_weight.dtype and slope_NV.shape[1] == V:
                    d_weight.addmm_(slope_NV.T, counted_hidden)
                else:
                    d_weight += (slope_NV.T @ counted_hidden)[:V]
            del slope_NV  # before the next chunk takes its memory
        ctx.save_for_backward(d_hidden, d_weight)
        return nats

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            d_hidden * slopes[0].to(d_hidden.dtype),
            d_weight * slopes[0].to(d_weight.dtype),
            *[None] * 5,
        )


def _rows_at_once(hidden_ND: Tensor, V: int, *, compiled: bool) -> int:
    """Rows of a chunk; a power of 2 on a GPU, so that chunks are alike, as a compiler wants it."""
    device_type = hidden_ND.device.type
    logits = CHUNK_LOGITS_COMPILED if compiled else CHUNK_LOGITS_EAGER
    if device_type in CHUNK_BYTES:
        logits = CHUNK_BYTES[device_type] // hidden_ND.element_size()
    rows = max(LEAST_ROWS, logits // V)
    if device_type not in BLOCK_LOGITS:
        rows = 1 << rows.bit_length() - 1
    return max(1, min(rows, hidden_ND.shape[0]))


def _slopes_by_block(
    weight_VD: Tensor,
    rows: int,
    exact: torch.dtype,
    smoothing: float,
    z_loss: float,
    total_type: torch.dtype,
) -> _Slope:
    """For a CPU: logits of a chunk in one room, and their slopes in their place; in between they
    are `exact`, in blocks that fit its cache."""
    V = weight_VD.shape[0]
    logits_room_NV = _padded_rows(rows, V, like=weight_VD)
    block_rows = min(rows, max(1, BLOCK_LOGITS["cpu"] // V))
    room_2BV = weight_VD.new_empty((2, block_rows, V), dtype=exact)

    def slope_of(hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = logits_room_NV[: len(hidden_ND)]
        torch.mm(hidden_ND, weight_VD.T, out=logits_NV)
        nats = torch.zeros((), dtype=total_type, device=hidden_ND.device)
        for first in range(0, len(hidden_ND), block_rows):
            block = slice(first, first + block_rows)
            nats += _nats_then_slope_(
                logits_NV[block], targets_N[block], room_2BV, smoothing, z_loss, total_type
            )
        return nats, logits_NV

    return slope_of


def _padded_rows(n: int, V: int, *, like: Tensor) -> Tensor:
    """Room for `n` rows of V, which do not lie end to end. What is between them is finite: oneDNN's
    products in bfloat16 multiply some of it by 0."""
    room = like.new_empty(n, -(-V // ROW_PADDING) * ROW_PADDING + ROW_PADDING)
    room[:, V:] = 0
    return room[:, :V]


def _nats_then_slope_(
    logits_NV: Tensor,
    targets_N: Tensor,
    room_2BV: Tensor,
    smoothing: float,
    z_loss: float,
    total_type: torch.dtype,
) -> Tensor:
    """Summed nats of some rows, whose logits become, in place, the slope of the objective."""
    exact_NV, slope_NV = room_2BV[:, : len(logits_NV)].unbind()
    exact_NV.copy_(logits_NV)
    torch.softmax(exact_NV, 1, out=slope_NV)
    counted_N1, picked_N1 = (targets_N != IGNORE_INDEX)[:, None], targets_N.clamp(min=0)[:, None]
    p_N1 = slope_NV.gather(1, picked_N1)
    log_p_N1 = p_N1.log()
    if _has_lost(p_N1):
        log_p_N1 = exact_NV.gather(1, picked_N1) - exact_NV.logsumexp(1, keepdim=True)
    if z_loss:
        # d (z log_sum^2) / d logits = 2 z log_sum softmax.
        log_sum_N1 = exact_NV.gather(1, picked_N1) - log_p_N1
        slope_NV *= 1 + 2 * z_loss * log_sum_N1
    # d nats / d logits = softmax - one_hot.
    slope_NV.scatter_add_(1, picked_N1, torch.full_like(p_N1, smoothing - 1.0))
    if smoothing:
        slope_NV -= smoothing / slope_NV.shape[1]
    logits_NV.copy_(slope_NV)
    return -torch.where(counted_N1, log_p_N1, 0).sum(dtype=total_type)


def _has_lost(p_N1: Tensor) -> bool:
    """Whether one of these is so unlikely that it has no number, and its logarithm has."""
    return bool((p_N1 < torch.finfo(p_N1.dtype).tiny).any())


def _slopes_at_once(
    weight_PD: Tensor,
    V: int,
    smoothing: float,
    z_loss: float,
    total_type: torch.dtype,
    *,
    compiled: bool,
) -> _Slope:
    """For a GPU: all of a chunk; compiled, its logits are read twice and their slopes written, in
    the precision of the products, while float32 stays within the chip."""
    function = _compiled_nats_and_slope() if compiled else _nats_and_slope

    def slope_of(hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        return function(hidden_ND @ weight_PD.T, targets_N, V, smoothing, z_loss, total_type)

    return slope_of


def _nats_and_slope(
    logits_NP: Tensor,
    targets_N: Tensor,
    V: int,
    smoothing: float,
    z_loss: float,
    total_type: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As `_nats_then_slope_`, of logits with columns beyond V, in operations that a compiler makes
    one of."""
    exact_NP = logits_NP.to(torch.promote_types(logits_NP.dtype, torch.float32))
    columns_P = torch.arange(logits_NP.shape[1], device=logits_NP.device)
    if logits_NP.shape[1] > V:
        exact_NP = exact_NP.masked_fill(columns_P >= V, float("-inf"))
    counted_N, picked_N = targets_N != IGNORE_INDEX, targets_N.clamp(min=0)
    log_sum_N = exact_NP.logsumexp(1)
    chosen_N = logits_NP.gather(1, picked_N[:, None])[:, 0].to(exact_NP.dtype)
    nats = torch.where(counted_N, log_sum_N - chosen_N, 0).sum(dtype=total_type)
    slope_NP = (exact_NP - log_sum_N[:, None]).exp()
    if z_loss:
        slope_NP = slope_NP * (1 + 2 * z_loss * log_sum_N[:, None])
    is_target_NP = columns_P == picked_N[:, None]
    slope_NP = torch.where(is_target_NP, slope_NP - (1 - smoothing), slope_NP)
    if smoothing:
        slope_NP = torch.where(columns_P < V, slope_NP - smoothing / V, slope_NP)
    return nats, slope_NP.to(logits_NP.dtype)


@cache
def _compiled_nats_and_slope() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_nats_and_slope, dynamic=False)


def chunked_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    compiled: bool = False,
) -> Tensor:
    """Nats (a scalar, summed) of the targets (N) under the logits hidden @ weight.T, without those
    logits.

    With label `smoothing` the value is still these nats, so that every reported number means the
    same; the gradient is that of the smoothed objective, in which a target has the probability 1 -
    smoothing, and that share is spread evenly over the vocabulary ("Rethinking the Inception
    Architecture for Computer Vision", Szegedy et al., 2016). So it is with `z_loss`, the weight of
    the squared log of the softmax's sum ("PaLM", Chowdhery et al., 2022).
    Where it is `compiled`, what a GPU does to each logit is one kernel; a CPU has its own way.
    """
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device_type))
    nats: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, smoothing, z_loss, compiled, torch.is_grad_enabled()
    )
    return nats


def reference_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The same by torch's own operators, with whole logits: the twin that the fast path must
    equal. With `smoothing` or `z_loss` its value is that whole objective."""
    logits_NV = hidden_ND @ weight_VD.T
    nats = F.cross_entropy(
        logits_NV,
        targets_N,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=smoothing,
    )
    if not z_loss:
        return nats
    counted_N = targets_N != IGNORE_INDEX
    return nats + z_loss * (logits_NV.logsumexp(-1).square() * counted_N).sum()


class LMLoss(nn.Module):
    """The decoder and its loss: what is compiled, sharded and wrapped.

    The context of a prediction is the window's ids up to and including x_i, so k + 1 in the formula
    is at most the context length T. `seed` keys the dropout masks; they are drawn only in training
    mode and for a rate above 0. So are `label_smoothing` and `z_loss`, which change gradients and
    never nats.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        seed: int = 0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.decoder, self.seed = decoder, seed
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.is_compiled = False

    def compile_parts(self, *, by_block: bool = False) -> None:
        """Have the decoder, or each of its blocks, and the loss made by torch's compiler, for
        batches of one shape."""
        self.is_compiled = True
        for module in self.decoder.blocks.values() if by_block else [self.decoder]:
            module.compile(dynamic=False)

    def cross_entropy(
        self, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, **how: float
    ) -> Tensor:
        """Nats of the targets; what equals it may be set in its place."""
        return chunked_cross_entropy(
            hidden_ND, weight_VD, targets_N, compiled=self.is_compiled, **how
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(nats, count): the sum of -log p(target | context), and how many targets were counted."""
        drops = self.training and self.decoder.config.dropout > 0
        dropout_rng = DropoutRng(self.seed, batch.samples) if drops else None
        hidden_BTD = self.decoder(batch.inputs, dropout_rng=dropout_rng)
        targets_N = batch.targets.flatten()
        nats = self.cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.decoder.head_weight,
            targets_N,
            smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0,
        )
        return nats, (targets_N != IGNORE_INDEX).sum()
