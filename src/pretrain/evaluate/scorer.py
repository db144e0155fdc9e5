"""Weights -> numbers: the log-probability of text, with every token counted once.

The one scorer of the project: the training loop, `pretrain evaluate` and tests all come through
here. Texts are read in windows of the context length that do not overlap, from an end-of-text on,
so a token is predicted from at most T - 1 tokens before it in its window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.batches import MicroBatch, evaluation_batches
from pretrain.model import Objective
from pretrain.tokenizer import Tokenizer
from pretrain.world import World

# Targets of one forward pass of an evaluation: no gradients are kept, so this may be more than in
# training.
EVALUATION_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the counted targets; what is printed is derived from them."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def per_word(self, words: int) -> float:
        """Perplexity of a word, when the same nats are shared by `words` words."""
        return math.exp(min(self.nats / words, 700.0)) if words else math.nan


@dataclass(frozen=True, slots=True)
class Ids:
    """A stream of ids in memory, with the two names that a stream on disk has too."""

    ids: NDArray[np.int64]

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        return self.ids[start:stop]


@torch.no_grad()
def score(
    objective: Objective,
    batches: Iterable[MicroBatch],
    *,
    byte_lengths_V: Tensor,
    world: World,
    precision: str = "fp32",
) -> Score:
    """Nats, tokens and bytes of the targets in `batches`, without dropout; the objective's mode is
    put back."""
    was_training = objective.training
    objective.eval()
    nats, tokens, n_bytes = 0.0, 0, 0
    for batch in batches:
        with world.autocast(precision):
            batch_nats, batch_count = objective(batch.to(world.device))
        nats += float(batch_nats)
        tokens += int(batch_count)
        n_bytes += int(byte_lengths_V[batch.targets[batch.targets >= 0]].sum())
    objective.train(was_training)
    return Score(nats, tokens, n_bytes)


def byte_lengths(tokenizer: Tokenizer) -> Tensor:
    """Bytes of text behind each id (V), 0 for the end of text."""
    return torch.from_numpy(tokenizer.byte_lengths())


def score_texts(
    objective: Objective,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    world: World,
    precision: str = "fp32",
) -> Score:
    """Score some documents, each from a fresh start-of-text; the ends of documents are not
    counted."""
    lengths = byte_lengths(tokenizer)
    context = objective.decoder.config.window_tokens
    rows = max(1, EVALUATION_TOKENS // context)
    total = Score(0.0, 0, 0)
    for text in texts:
        ids = np.concatenate([[tokenizer.start_of_text], tokenizer.encode(text)]).astype(np.int64)
        # A short text is one short window: what would be padding is not computed.
        window = min(context, max(1, len(ids) - 1))
        batches = evaluation_batches(Ids(ids), context_length=window, rows=rows)
        part = score(objective, batches, byte_lengths_V=lengths, world=world, precision=precision)
        total = Score(total.nats + part.nats, total.tokens + part.tokens, total.bytes + part.bytes)
    return total
