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
# Logits of one chunk: 2^20 numbers are 4 MB in float32, about what stays in a CPU core's share of
# cache.
CHUNK_LOGITS = 1 << 20


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
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, hidden_ND.shape[0], rows):
            hidden, targets = hidden_ND[start : start + rows], targets_N[start : start + rows]
            counted_N1 = (targets != NOT_COUNTED)[:, None]
            picked_N1 = targets.clamp(min=0)[:, None]
            logits_NV = (hidden @ weight.T).to(weight_VD.dtype)
            chosen_N1, largest_N1 = logits_NV.gather(1, picked_N1), logits_NV.amax(1, keepdim=True)
            slope_NV = logits_NV.softmax(1)
            # log sum exp from the largest probability, which never underflows as others may.
            likeliest_N1 = slope_NV.amax(1, keepdim=True)
            log_sum_N1 = largest_N1 - likeliest_N1.log()
            losses_N1 = log_sum_N1 - chosen_N1
            nats += torch.where(counted_N1, losses_N1, 0).sum(dtype=total_type)
            if d_hidden is None or d_weight is None:
                continue
            if z_loss:
                # d (z log_sum^2) / d logits = 2 z log_sum softmax.
                slope_NV *= 1 + 2 * z_loss * log_sum_N1
            # d nats / d logits = softmax - one_hot; rows that do not count are struck out where
            # they are narrow, not over the whole vocabulary.
            slope_NV.scatter_add_(1, picked_N1, torch.full_like(chosen_N1, smoothing - 1.0))
            if smoothing:
                slope_NV -= smoothing / slope_NV.shape[1]
            slope_NV = slope_NV.to(hidden.dtype)
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

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(nats, count): the sum of -log p(target | context), and how many targets were counted."""
        drops = self.training and self.decoder.config.dropout > 0
        noise = Noise(self.seed, batch.samples) if drops else None
        hidden_BTD = self.decoder(batch.inputs, noise=noise)
        targets_N = batch.targets.flatten()
        nats = linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.decoder.head_weight,
            targets_N,
            smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0,
        )
        return nats, (targets_N != NOT_COUNTED).sum()
