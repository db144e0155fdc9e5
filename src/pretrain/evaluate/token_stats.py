"""Token by token: what a model expected in each place of a text, and what came.

Ids with a context come in; for each further id its nats, its rank and the likeliest ids go out, or
the same as plain values for people to look at. Windows are those of `continuations`, so the sum of
the nats is the score of the text. A pair without context or continuation is refused there.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.data.batches import resolve_stride
from pretrain.distributed import World
from pretrain.evaluate.loglikelihood import LOGIT_ROWS, Pair, windows_of
from pretrain.model import Decoder
from pretrain.tokenizer import Tokenizer

N_CARDS, CARD_CONTEXT_TOKENS = 6, 60


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """A token that came, beside what was expected in its place."""

    id: int
    nats: float
    rank: int
    """1 for the likeliest"""
    most_probable: tuple[tuple[int, float], ...]
    """ids and their probabilities, the likeliest first"""

    @property
    def probability(self) -> float:
        return math.exp(-self.nats)


@torch.no_grad()
def token_losses(
    decoder: Decoder,
    pair: Pair,
    *,
    world: World,
    precision: str = "fp32",
    stride: int | None = None,
    top: int = 5,
) -> list[TokenLoss]:
    """An expectation for each id of the continuation. ValueError for a pair without context or
    continuation, and for a stride that does not fit the context."""
    if not 1 <= pair.n_context < len(pair.ids):
        raise ValueError(f"{pair.n_context} of {len(pair.ids)} ids are context; legal: 1 up")
    context = decoder.config.window_tokens
    found: list[TokenLoss] = []
    for start, stop, n in windows_of(
        pair, context_length=context, stride=resolve_stride(stride, context)
    ):
        inputs_BT = torch.tensor([pair.ids[start:stop]], device=decoder.device)
        with world.autocast(precision):
            hidden_TD = decoder.forward(inputs_BT)[0, -n:]
            for first in range(0, n, LOGIT_ROWS):
                targets = pair.ids[stop + 1 - n + first : stop + 1][:LOGIT_ROWS]
                logits_TV = decoder.logits(hidden_TD[first : first + LOGIT_ROWS])
                found += _expectations(logits_TV, targets, top=top)
    return found


def _expectations(logits_TV: Tensor, targets: Sequence[int], *, top: int) -> list[TokenLoss]:
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    log_p_TV = logits_TV.log_softmax(-1)
    targets_T1 = torch.tensor(targets, device=logits_TV.device)[:, None]
    chosen_T1 = log_p_TV.gather(1, targets_T1)
    ranks_T = 1 + (log_p_TV > chosen_T1).sum(-1)
    best = log_p_TV.topk(min(top, log_p_TV.shape[-1]))
    rows = zip(
        targets,
        (-chosen_T1[:, 0]).tolist(),
        ranks_T.tolist(),
        best.indices.tolist(),
        best.values.cpu().double().exp().tolist(),
        strict=True,
    )
    return [
        TokenLoss(id_, nats, rank, tuple(zip(ids, probabilities, strict=True)))
        for id_, nats, rank, ids, probabilities in rows
    ]


def annotated_text(tokenizer: Tokenizer, found: Sequence[TokenLoss]) -> list[dict[str, Any]]:
    """The text in pieces, each a token, or the tokens that a character is made of: its text, and
    the nats and the rank of each of its tokens."""
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    made: list[dict[str, Any]] = []
    is_whole = True
    for number, each in enumerate(found, start=1):
        text = characters.decode(tokenizer.token_bytes(each.id), final=number == len(found))
        if is_whole:
            made.append({"text": "", "nats": [], "ranks": []})
        made[-1]["text"] += text
        made[-1]["nats"].append(each.nats)
        made[-1]["ranks"].append(each.rank)
        is_whole = not characters.getstate()[0]
    return made


def card(tokenizer: Tokenizer, before: Sequence[int], expectation: TokenLoss) -> dict[str, Any]:
    """A flash card: the context (the end of it), the likeliest tokens, and the one that came."""
    return {
        "context": tokenizer.decode(before[-CARD_CONTEXT_TOKENS:]),
        "likeliest": [
            {"text": tokenizer.token_text(i), "probability": p}
            for i, p in expectation.most_probable
        ],
        "answer": {
            "text": tokenizer.token_text(expectation.id),
            "probability": expectation.probability,
            "rank": expectation.rank,
            "nats": expectation.nats,
        },
    }


def predictions(
    decoder: Decoder,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    *,
    world: World,
    precision: str = "fp32",
) -> dict[str, Any]:
    """What a run keeps of a passage: its pieces, and some cards, evenly spread over it."""
    pair = Pair((tokenizer.start_of_text, *ids), 1)
    found = token_losses(decoder, pair, world=world, precision=precision)
    places = sorted({(n + 1) * len(ids) // (N_CARDS + 1) for n in range(N_CARDS)} - {0})
    return {
        "passage": annotated_text(tokenizer, found),
        "cards": [card(tokenizer, ids[:place], found[place]) for place in places],
    }
