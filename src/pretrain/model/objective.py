"""The objective: maximise L(X) = sum_i log p(x_{i+1} | x_{i-k}, ..., x_i), as a sum of nats and a
count.

A micro-batch goes in; the sum of -log p over its targets and the number of those targets come out.
The division happens once, over everything that a step saw, and not here. Whole logits are never
kept: the loss walks over the rows in chunks and makes both gradients on the way.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.model.decoder import Decoder
from pretrain.model.random import Noise

# A target of -100 is not counted: padding at the end of an evaluation.
NOT_COUNTED = -100
# Logits that exist at once, and the rows that are taken all the same: products of fewer rows than
# that walk through the whole head for little.
CHUNK_LOGITS = {"cpu": 1 << 21}
CHUNK_LOGITS_OF_A_GPU = 1 << 28
LEAST_ROWS = 512
# What is done to each logit is done to so many at a time, which stay in a CPU core's cache.
BLOCK_LOGITS = 1 << 20
# Rows of exactly V numbers may lie so that their beginnings drive each other out of the cache: MKL
# then takes 1.4 times as long (V 50,257). Rows of a few numbers more do not.
ROW_PADDING = 16


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
    ) -> Tensor:
        # The sum is kept in float64 where there is one, so that it hardly depends on how rows are
        # grouped.
        total_type = torch.float32 if hidden_ND.device.type == "mps" else torch.float64
        nats = torch.zeros((), dtype=total_type, device=hidden_ND.device)
        with_gradients = any(ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden_ND) if with_gradients else None
        d_weight = torch.zeros_like(weight_VD) if with_gradients else None
        weight = weight_VD.to(hidden_ND.dtype)
        rows, block_rows = _rows_at_once(hidden_ND, weight)
        room = _padded_rows(rows, like=weight_VD)
        for start in range(0, hidden_ND.shape[0], rows):
            hidden, targets = hidden_ND[start : start + rows], targets_N[start : start + rows]
            logits_NV = room[: len(hidden)]
            if hidden.dtype == room.dtype:
                torch.mm(hidden, weight.T, out=logits_NV)
            else:
                logits_NV.copy_(hidden @ weight.T)
            for first in range(0, len(hidden), block_rows):
                block = slice(first, first + block_rows)
                nats += _nats_then_slope_(
                    logits_NV[block], targets[block], smoothing, z_loss, total_type
                )
            if d_hidden is None or d_weight is None:
                continue
            # Rows that do not count are struck out where they are narrow, not over the vocabulary.
            counted_N1 = (targets != NOT_COUNTED)[:, None]
            slope_NV = logits_NV.to(hidden.dtype)
            torch.mul(slope_NV @ weight, counted_N1, out=d_hidden[start : start + rows])
            counted_hidden = hidden * counted_N1
            if hidden.dtype == d_weight.dtype:
                d_weight.addmm_(slope_NV.T, counted_hidden)
            else:
                d_weight += slope_NV.T @ counted_hidden
        ctx.save_for_backward(d_hidden, d_weight)
        return nats

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            d_hidden * slopes[0].to(d_hidden.dtype),
            d_weight * slopes[0].to(d_weight.dtype),
            None,
            None,
            None,
        )


def _rows_at_once(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[int, int]:
    """Rows of a chunk, and of a block of it."""
    V, device_type = weight_VD.shape[0], hidden_ND.device.type
    chunk = CHUNK_LOGITS.get(device_type, CHUNK_LOGITS_OF_A_GPU)
    rows = max(1, min(max(LEAST_ROWS, chunk // V), hidden_ND.shape[0]))
    return rows, max(1, BLOCK_LOGITS // V) if device_type == "cpu" else rows


def _padded_rows(n: int, *, like: Tensor) -> Tensor:
    """Room for `n` rows as long as `like` (V, D) has, which do not lie end to end."""
    V = like.shape[0]
    return like.new_empty(n, -(-V // ROW_PADDING) * ROW_PADDING + ROW_PADDING)[:, :V]


def _nats_then_slope_(
    logits_NV: Tensor, targets_N: Tensor, smoothing: float, z_loss: float, total_type: torch.dtype
) -> Tensor:
    """Summed nats of some rows, whose logits become, in place, the slope of the objective."""
    counted_N1, picked_N1 = (targets_N != NOT_COUNTED)[:, None], targets_N.clamp(min=0)[:, None]
    chosen_N1, largest_N1 = logits_NV.gather(1, picked_N1), logits_NV.amax(1, keepdim=True)
    slope_NV = logits_NV.softmax(1)
    # log sum exp from the largest probability, which never underflows as others may.
    log_sum_N1 = largest_N1 - slope_NV.amax(1, keepdim=True).log()
    nats = torch.where(counted_N1, log_sum_N1 - chosen_N1, 0).sum(dtype=total_type)
    if z_loss:
        # d (z log_sum^2) / d logits = 2 z log_sum softmax.
        slope_NV *= 1 + 2 * z_loss * log_sum_N1
    # d nats / d logits = softmax - one_hot.
    slope_NV.scatter_add_(1, picked_N1, torch.full_like(chosen_N1, smoothing - 1.0))
    if smoothing:
        slope_NV -= smoothing / slope_NV.shape[1]
    logits_NV.copy_(slope_NV)
    return nats


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Nats (a scalar, summed) of the targets (N) under the logits hidden @ weight.T, without those
    logits.

    With label `smoothing` the value is still these nats, so that every reported number means the
    same; the gradient is that of the smoothed objective, in which a target has the probability 1 -
    smoothing, and that share is spread evenly over the vocabulary ("Rethinking the Inception
    Architecture for Computer Vision", Szegedy et al., 2016). So it is with `z_loss`, the weight of
    the squared log of the softmax's sum ("PaLM", Chowdhery et al., 2022).
    """
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device_type))
    nats: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, smoothing, z_loss
    )
    return nats


def plain_linear_cross_entropy(
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
        ignore_index=NOT_COUNTED,
        reduction="sum",
        label_smoothing=smoothing,
    )
    if not z_loss:
        return nats
    counted_N = targets_N != NOT_COUNTED
    return nats + z_loss * (logits_NV.logsumexp(-1).square() * counted_N).sum()


class Objective(nn.Module):
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

    def cross_entropy(
        self, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, **how: float
    ) -> Tensor:
        """Nats of the targets; what equals it may be set in its place."""
        return linear_cross_entropy(hidden_ND, weight_VD, targets_N, **how)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(nats, count): the sum of -log p(target | context), and how many targets were counted."""
        drops = self.training and self.decoder.config.dropout > 0
        noise = Noise(self.seed, batch.samples) if drops else None
        hidden_BTD = self.decoder(batch.inputs, noise=noise)
        targets_N = batch.targets.flatten()
        nats = self.cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.decoder.head_weight,
            targets_N,
            smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0,
        )
        return nats, (targets_N != NOT_COUNTED).sum()
