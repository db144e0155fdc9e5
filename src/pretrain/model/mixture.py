"""Several decoders as one, whose probabilities are the weighted arithmetic mean of theirs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.model.counts import CountDecoder
from pretrain.model.decoder import Decoder
from pretrain.model.layers import KeyValueCache

# Rows of logits in memory at once.
_ROWS = 1024
# A weight of 0 would have no logarithm.
_LEAST_WEIGHT = 1e-9


class Mixture(Decoder):
    """Decoders of one vocabulary, each with its weight, with the interface of one decoder.

    Its hidden states are theirs, concatenated, and its logits are logarithms of the mean
    probabilities. It predicts and is not trained: it has no head of its own. "Interpolated
    estimation of Markov source parameters from sparse data" (Jelinek and Mercer, 1980).
    """

    def __init__(self, decoders: Sequence[Decoder], weights: Sequence[float]) -> None:
        nn.Module.__init__(self)
        self.decoders, self.parts = decoders, nn.ModuleList(decoders)
        self.log_weights = [math.log(weight / math.fsum(weights)) for weight in weights]
        self.vocab_size = decoders[0].vocab_size
        # A window that all of them can read.
        self.config = min((each.config for each in decoders), key=lambda c: c.window_tokens)

    def forward(self, ids_BT: Tensor, *, cache: KeyValueCache | None = None, **_: Any) -> Tensor:
        """Compute the last hidden states of all decoders (B, T, the sum of their D)."""
        hidden = [
            decoder.forward(ids_BT, cache=None if cache is None else cache.of_part(i))
            for i, decoder in enumerate(self.decoders)
        ]
        return torch.cat(hidden, dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the log of the mean probability (..., V), in float32 or more."""
        parts = zip(self.log_p_of_parts(hidden), self.log_weights, strict=True)
        return torch.stack([log_p + log_weight for log_p, log_weight in parts]).logsumexp(0)

    def log_p_of_parts(self, hidden: Tensor) -> list[Tensor]:
        """Compute the log of the probability (..., V) of each decoder, in float32 or more."""
        widths = [
            decoder.width if isinstance(decoder, CountDecoder) else decoder.config.d_model
            for decoder in self.decoders
        ]
        parts = zip(self.decoders, torch.split(hidden, widths, dim=-1), strict=True)
        logits = [decoder.logits(own_hidden) for decoder, own_hidden in parts]
        return [x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in logits]


@torch.no_grad()
def target_probabilities(decoder: Decoder, batches: Iterable[Any]) -> Tensor:
    """Return the probability (N,), in float64, that a decoder gives each target of the batches."""
    columns = []
    for batch in batches:
        is_valid_BT = batch.targets >= 0
        hidden_ND = decoder.forward(batch.inputs.to(decoder.device))[is_valid_BT]
        targets_N1 = batch.targets[is_valid_BT].to(decoder.device)[:, None]
        chunks = (torch.split(each, _ROWS) for each in (hidden_ND, targets_N1))
        for hidden, targets in zip(*chunks, strict=True):
            if isinstance(decoder, CountDecoder):  # whose logits of a whole vocabulary are slow
                p_N = decoder.target_probabilities(hidden, targets[:, 0])
            else:
                logits = decoder.logits(hidden)
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                p_N = wide.softmax(-1).gather(1, targets)[:, 0]
            columns.append(p_N.cpu().double())
    return torch.cat(columns)


def fit_weights(p_NP: Tensor, *, steps: int = 50) -> list[float]:
    """Return the weights of P decoders under whose mean their probabilities of N targets are
    highest, by expectation maximisation from equal ones (Jelinek and Mercer, 1980)."""
    weights_P = torch.full((p_NP.shape[1],), 1 / p_NP.shape[1], dtype=torch.float64)
    for _ in range(steps if len(p_NP) else 0):
        shares_NP = p_NP * weights_P
        weights_P = (shares_NP / shares_NP.sum(1, keepdim=True)).mean(0).clamp(min=_LEAST_WEIGHT)
    fitted: list[float] = weights_P.tolist()
    return fitted


def held_out_probabilities(p_NP: Tensor) -> Tensor:
    """Return the probability (N,) of each target by a mean that was not fitted to it: each half of
    the targets has the weights that are best for the other."""
    halves = p_NP[: len(p_NP) // 2], p_NP[len(p_NP) // 2 :]
    pairs = zip(halves, reversed(halves), strict=True)
    return torch.cat([own @ torch.tensor(fit_weights(other)).to(own) for own, other in pairs])
