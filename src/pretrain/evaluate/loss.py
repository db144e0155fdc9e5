"""Weights -> numbers: the log-probability of text, with every token counted once.

The one scorer of the project: the training loop, `pretrain evaluate` and tests all come through
here. Texts are read from a start-of-text on, in windows of the context length T that do not overlap
unless a shorter stride is asked for. `continuations` does the same for what follows a context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.batches import MicroBatch, evaluation_batches, resolve_stride
from pretrain.distributed import World
from pretrain.model import LMLoss
from pretrain.tokenizer import Tokenizer

# Targets of one forward pass of an evaluation: no gradients are kept, so this may be more than in
# training.
EVALUATION_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the counted targets; what is printed is derived from them."""

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

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
def score_batches(
    lm_loss: LMLoss,
    batches: Iterable[MicroBatch],
    *,
    byte_lengths_V: Tensor,
    world: World,
    precision: str = "fp32",
) -> list[Score]:
    """Nats, tokens and bytes of the targets in each of `batches`, without dropout; the objective's
    mode is put back."""
    was_training = lm_loss.training
    lm_loss.eval()
    found = []
    for batch in batches:
        with world.autocast(precision):
            nats, count = lm_loss(batch.to(world.device))
        n_bytes = byte_lengths_V[batch.targets[batch.targets >= 0]].sum()
        found.append(Score(float(nats), int(count), int(n_bytes)))
    lm_loss.train(was_training)
    return found


def score(lm_loss: LMLoss, batches: Iterable[MicroBatch], **how: Any) -> Score:
    """The exact sum of `score_batches`, whatever their order."""
    found = score_batches(lm_loss, batches, **how)
    nats = math.fsum(each.nats for each in found)
    return Score(nats, sum(each.tokens for each in found), sum(each.bytes for each in found))


def byte_lengths(tokenizer: Tokenizer) -> Tensor:
    """Bytes of text behind each id (V), 0 for the end of text."""
    return torch.from_numpy(tokenizer.byte_lengths())


def score_texts(
    lm_loss: LMLoss,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    world: World,
    precision: str = "fp32",
    stride: int | None = None,
) -> Score:
    """The sum of `score_each`."""
    each = score_each(lm_loss, tokenizer, texts, world=world, precision=precision, stride=stride)
    return sum(each, Score(0.0, 0, 0))


def score_each(
    lm_loss: LMLoss,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    world: World,
    precision: str = "fp32",
    stride: int | None = None,
) -> list[Score]:
    """Score some documents, each from a fresh start-of-text; the ends of documents are not
    counted; bytes are those of the texts, whatever a tokenizer makes of them. Windows begin every
    `stride` tokens, by default as many as the context has; ValueError for more."""
    lengths = byte_lengths(tokenizer)
    context = lm_loss.decoder.config.window_tokens
    stride = resolve_stride(stride, context)
    rows = max(1, EVALUATION_TOKENS // context)
    scores = []
    for text in texts:
        ids = np.concatenate([[tokenizer.start_of_text], tokenizer.encode(text)]).astype(np.int64)
        # A short text is one short window: what would be padding is not computed.
        window = min(context, max(1, len(ids) - 1))
        batches = evaluation_batches(
            Ids(ids),
            context_length=window,
            rows=rows,
            stride=min(stride, window),
        )
        found = score(lm_loss, batches, byte_lengths_V=lengths, world=world, precision=precision)
        scores.append(replace(found, bytes=len(text.encode("utf-8", "replace"))))
    return scores
