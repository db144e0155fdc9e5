"""Token by token: the loss of each token of a text, its rank, and what the model predicted.

Windows are those of `loglikelihood`, so the sum of the nats is the score of the text. For people
there are pieces of text with the loss of each token (a heat map), and flash cards: a context, the
most probable next tokens, and the token that came.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.data.batches import resolve_stride
from pretrain.distributed import World
from pretrain.evaluate.loglikelihood import LOGIT_ROWS, Pair, windows_of
from pretrain.model.decoder import Decoder
from pretrain.tokenizer.tokenizer import Tokenizer

N_CARDS = 6
CARD_CONTEXT_TOKENS = 60


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """One token of a text, with what the model predicted in its place."""

    id: int
    nats: float
    rank: int
    """1 for the most probable id"""
    most_probable: tuple[tuple[int, float], ...]
    """ids with their probabilities, in descending order"""

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
    """The loss of each id of the continuation, with the `top` most probable ids in its place.
    ValueError for a stride larger than the context."""
    context = decoder.config.window_tokens
    stride = resolve_stride(stride, context)
    losses: list[TokenLoss] = []
    for start, stop, n in windows_of(pair, context_length=context, stride=stride):
        inputs_BT = torch.tensor([pair.ids[start:stop]], device=decoder.device)
        first_target = stop + 1 - n
        with world.autocast(precision):
            hidden_TD = decoder.forward(inputs_BT)[0, -n:]
            for row in range(0, n, LOGIT_ROWS):
                targets = pair.ids[first_target + row : stop + 1][:LOGIT_ROWS]
                logits_TV = decoder.logits(hidden_TD[row : row + LOGIT_ROWS])
                losses += _losses_of(logits_TV, targets, top=top)
    return losses


def _losses_of(logits_TV: Tensor, targets: Sequence[int], *, top: int) -> list[TokenLoss]:
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    log_p_TV = logits_TV.log_softmax(-1)
    targets_T1 = torch.tensor(targets, device=logits_TV.device)[:, None]
    target_log_p_T1 = log_p_TV.gather(1, targets_T1)
    ranks_T = 1 + (log_p_TV > target_log_p_T1).sum(-1)
    best = log_p_TV.topk(min(top, log_p_TV.shape[-1]))
    rows = zip(
        targets,
        (-target_log_p_T1[:, 0]).tolist(),
        ranks_T.tolist(),
        best.indices.tolist(),
        best.values.cpu().double().exp().tolist(),
        strict=True,
    )
    return [
        TokenLoss(id_, nats, rank, tuple(zip(ids, probabilities, strict=True)))
        for id_, nats, rank, ids, probabilities in rows
    ]


def annotated_text(tokenizer: Tokenizer, losses: Sequence[TokenLoss]) -> list[dict[str, Any]]:
    """Cut a text into pieces of complete characters, with the nats and ranks of their tokens. A
    piece is one token, or several that share the bytes of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces: list[dict[str, Any]] = []
    is_complete = True
    for number, loss in enumerate(losses, start=1):
        text = decoder.decode(tokenizer.token_bytes(loss.id), final=number == len(losses))
        if is_complete:
            pieces.append({"text": "", "nats": [], "ranks": []})
        pieces[-1]["text"] += text
        pieces[-1]["nats"].append(loss.nats)
        pieces[-1]["ranks"].append(loss.rank)
        is_complete = not decoder.getstate()[0]
    return pieces


def annotated_documents(
    decoder: Decoder,
    tokenizer: Tokenizer,
    documents: Iterable[tuple[str, str]],
    *,
    max_tokens: int,
    world: World,
    precision: str = "fp32",
    stride: int | None = None,
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """The first `max_tokens` tokens of named documents as `annotated_text`, by name, and the number
    of tokens. Documents without a token are left out."""
    annotated: dict[str, list[dict[str, Any]]] = {}
    n_tokens = 0
    for name, text in documents:
        if n_tokens == max_tokens:
            break
        ids = tokenizer.encode(text).tolist()[: max_tokens - n_tokens]
        if not ids:
            continue
        n_tokens += len(ids)
        pair = Pair((tokenizer.start_of_text, *ids), 1)
        losses = token_losses(decoder, pair, world=world, precision=precision, stride=stride, top=1)
        annotated[name] = annotated_text(tokenizer, losses)
    return annotated, n_tokens


def flash_card(tokenizer: Tokenizer, before: Sequence[int], loss: TokenLoss) -> dict[str, Any]:
    """The end of the context, the most probable next tokens, and the token that came."""
    return {
        "context": tokenizer.decode(before[-CARD_CONTEXT_TOKENS:]),
        "most_probable": [
            {"text": tokenizer.token_text(id_), "probability": p} for id_, p in loss.most_probable
        ],
        "answer": {
            "text": tokenizer.token_text(loss.id),
            "probability": loss.probability,
            "rank": loss.rank,
            "nats": loss.nats,
        },
    }


def sample_text_predictions(
    decoder: Decoder,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    *,
    world: World,
    precision: str = "fp32",
) -> dict[str, Any]:
    """The content of a run's predictions.json: a sample text with the loss of each token, and flash
    cards spread evenly over it."""
    pair = Pair((tokenizer.start_of_text, *ids), 1)
    losses = token_losses(decoder, pair, world=world, precision=precision)
    positions = sorted({(n + 1) * len(ids) // (N_CARDS + 1) for n in range(N_CARDS)} - {0})
    return {
        "passage": annotated_text(tokenizer, losses),
        "cards": [flash_card(tokenizer, ids[:i], losses[i]) for i in positions],
    }
