"""Several decoders as one, whose probabilities are the weighted arithmetic mean of theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.model.decoder import Decoder
from pretrain.model.layers import KeyValueCache


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
        widths = [decoder.config.d_model for decoder in self.decoders]
        log_p = []
        for decoder, log_weight, own_hidden in zip(
            self.decoders, self.log_weights, torch.split(hidden, widths, dim=-1), strict=True
        ):
            logits = decoder.logits(own_hidden)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            log_p.append(logits.log_softmax(-1) + log_weight)
        return torch.stack(log_p).logsumexp(0)
