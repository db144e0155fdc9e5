"""Weights -> the loss of text: nats, perplexity and bits per byte, with every token counted once.

The training loop, `pretrain evaluate` and the tests all measure the loss of text here. A text is
read after a start-of-text token, in windows of the context length T, which do not overlap unless a
smaller stride is given. `loglikelihood` does the same for a continuation after a context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.batches import MicroBatch, Stream, evaluation_batches, resolve_stride
from pretrain.distributed import World
from pretrain.evaluate.metrics import MAX_EXPONENT
from pretrain.model.decoder import Decoder
from pretrain.model.loss import LMLoss
from pretrain.tokenizer.tokenizer import Tokenizer

# Targets in one forward pass. No gradients are kept, so this may be more than in training.
EVALUATION_TOKENS = 4096


class Model(Protocol):
    """A model that can be evaluated; `pretrain.load_model` returns one."""

    decoder: Decoder
    tokenizer: Tokenizer
    world: World
    precision: str


@dataclass(slots=True)
class ScoredModel:
    """A `Model` that was not loaded, such as that of a run in training."""

    decoder: Decoder
    tokenizer: Tokenizer
    world: World
    precision: str = "fp32"


@dataclass(frozen=True, slots=True)
class Score:
    """The loss of some text, from sums over its valid targets: their nats, their number (tokens),
    and the bytes of text behind them."""

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def nats_per_token(self) -> float:
        """The loss; nan without a token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """e to the nats per token."""
        return math.exp(min(self.nats_per_token, MAX_EXPONENT))

    @property
    def bits_per_byte(self) -> float:
        """The loss per byte of text, in bits; nan without a byte."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def word_perplexity(self, n_words: int) -> float:
        """Perplexity per word, if the text has `n_words` words."""
        return math.exp(min(self.nats / n_words, MAX_EXPONENT)) if n_words else math.nan


@dataclass(frozen=True, slots=True)
class Ids:
    """A token stream in memory, with the interface of a stream on disk."""

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
    counts: bool = True,
) -> Score:
    """The loss of the batches of all processes together, without dropout. Restores the module's
    training mode. Of processes that have the same batches, only one `counts`."""
    was_training = lm_loss.training
    lm_loss.eval()
    scores = []
    for batch in batches:
        with world.autocast(precision):
            nats, n_targets = lm_loss(batch.to(world.device))
        n_bytes = byte_lengths_V[batch.targets[batch.targets >= 0]].sum()
        scores.append(Score(float(nats), int(n_targets), int(n_bytes)))
    lm_loss.train(was_training)
    scores = scores if counts else []
    # fsum over all batches: the result does not depend on which process scored which.
    nats = world.fsum(each.nats for each in scores)
    own = sum(each.tokens for each in scores), sum(each.bytes for each in scores)
    return Score(nats, *map(int, world.all_sum(*own)))


def score_stream(
    model: Model, stream: Stream, *, context_length: int | None = None, stride: int | None = None
) -> Score:
    """Score a token stream, in which every id but the first is a target. Windows have
    `context_length` ids (default: the model's) and start every `stride` ids (default: they do not
    overlap). ValueError for a stride that would leave targets out."""
    context_length = context_length or model.decoder.config.window_tokens
    rows = max(1, EVALUATION_TOKENS // context_length)
    batches = evaluation_batches(stream, context_length=context_length, rows=rows, stride=stride)
    return score_batches(
        LMLoss(model.decoder).train(model.decoder.training),  # a new module is in training mode
        batches,
        byte_lengths_V=torch.from_numpy(model.tokenizer.byte_lengths),
        world=model.world,
        precision=model.precision,
    )


def score_each(model: Model, texts: Sequence[str], *, stride: int | None = None) -> list[Score]:
    """Score documents, each after a start-of-text token of its own; ends of documents are not
    targets. Bytes are those of the text, even where the tokenizer changes it. Windows start every
    `stride` tokens (default: the context length); ValueError for a larger stride."""
    tokenizer, context = model.tokenizer, model.decoder.config.window_tokens
    stride = resolve_stride(stride, context)
    scores = []
    for text in texts:
        ids = np.concatenate([[tokenizer.start_of_text], tokenizer.encode(text)]).astype(np.int64)
        # A text shorter than the context is one shorter window, so no padding is computed.
        window = min(context, max(1, len(ids) - 1))
        text_score = score_stream(
            model, Ids(ids), context_length=window, stride=min(stride, window)
        )
        scores.append(replace(text_score, bytes=len(text.encode("utf-8", "replace"))))
    return scores


def score_texts(model: Model, texts: Sequence[str], *, stride: int | None = None) -> Score:
    """The sum of `score_each`."""
    return sum(score_each(model, texts, stride=stride), Score(0.0, 0, 0))
