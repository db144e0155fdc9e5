"""Token by token: the loss of each token of a text, its rank, and what the model predicted.

Windows are those of `loglikelihood`, so the sum of the nats is the score of the text. For people
there are pieces of text with the loss of each token (a heat map), and flash cards: a context, the
most probable next tokens, and the token that came.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pretrain.corpus.documents import Document
from pretrain.data.batches import Stream, evaluation_batches, resolve_stride
from pretrain.evaluate.bootstrap import estimate
from pretrain.evaluate.loglikelihood import Pair, logit_chunks, windows_of
from pretrain.evaluate.loss import EVALUATION_TOKENS, Model
from pretrain.tokenizer.tokenizer import Tokenizer

N_CARDS = 6
CARD_CONTEXT_TOKENS = 60
MAX_HEAT_MAP_TOKENS = 20_000
"""A page of more tokens is too slow to look at."""
ERROR_TOKENS, ERROR_BLOCKS, MIN_BLOCK_TOKENS = 16_384, 32, 16
"""What a standard error is computed from: targets, and blocks of them."""


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

    def row(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The token for people and JSON: text, probability, rank and nats."""
        return {
            "text": tokenizer.token_text(self.id),
            "probability": self.probability,
            "rank": self.rank,
            "nats": self.nats,
        }


@torch.no_grad()
def token_losses(
    model: Model, pair: Pair, *, stride: int | None = None, top: int = 5
) -> list[TokenLoss]:
    """The loss of each id of the continuation, with the `top` most probable ids in its place.
    ValueError for a stride larger than the context."""
    decoder = model.decoder
    context = decoder.config.window_tokens
    stride = resolve_stride(stride, context)
    losses: list[TokenLoss] = []
    for start, stop, n in windows_of(pair, context_length=context, stride=stride):
        with model.world.autocast(model.precision):
            inputs_BT = torch.tensor([pair.ids[start:stop]], device=decoder.device)
            hidden_ND = decoder.forward(inputs_BT)[0, -n:]
            targets_N = torch.tensor(pair.ids[stop + 1 - n : stop + 1])
            for logits_NV, chunk_N in logit_chunks(decoder, hidden_ND, targets_N):
                log_p_NV = logits_NV.log_softmax(-1)
                target_log_p_N1 = log_p_NV.gather(1, chunk_N[:, None])
                best = log_p_NV.topk(min(top, log_p_NV.shape[-1]))
                rows = zip(
                    chunk_N.tolist(),
                    (-target_log_p_N1[:, 0]).tolist(),
                    (1 + (log_p_NV > target_log_p_N1).sum(-1)).tolist(),
                    best.indices.tolist(),
                    best.values.cpu().double().exp().tolist(),
                    strict=True,
                )
                losses += [
                    TokenLoss(id_, nats, rank, tuple(zip(ids, probabilities, strict=True)))
                    for id_, nats, rank, ids, probabilities in rows
                ]
    return losses


@torch.no_grad()
def bits_per_byte_error(model: Model, stream: Stream) -> float | None:
    """The standard error of a stream's bits per byte: a bootstrap over blocks of consecutive
    targets, because neighbours are alike. None where it cannot be told.

    Of a stream of more than ERROR_TOKENS, windows that are evenly spread stand for the others.
    """
    decoder, n_targets = model.decoder, stream.n_tokens - 1
    context = decoder.config.window_tokens
    bits: list[float] = []
    ids: list[int] = []
    n_rows = max(1, EVALUATION_TOKENS // context)
    for batch in evaluation_batches(
        stream, context_length=context, rows=n_rows, limit_tokens=ERROR_TOKENS
    ):
        is_target_BT = batch.targets >= 0
        with model.world.autocast(model.precision):
            hidden_ND = decoder.forward(batch.inputs.to(decoder.device))[is_target_BT]
            for logits_NV, ids_N in logit_chunks(decoder, hidden_ND, batch.targets[is_target_BT]):
                nats_N = torch.nn.functional.cross_entropy(logits_NV, ids_N, reduction="none")
                bits += (nats_N / math.log(2)).tolist()
                ids += ids_N.tolist()
    rows = np.stack([bits, model.tokenizer.byte_lengths[np.array(ids, np.int64)]], axis=1)
    n_blocks = min(ERROR_BLOCKS, len(rows) // MIN_BLOCK_TOKENS)
    starts = np.linspace(0, len(rows), n_blocks, endpoint=False, dtype=np.int64)
    stderr = estimate("bits_per_byte", np.add.reduceat(rows, starts), seed=0).stderr
    return None if stderr is None else stderr * math.sqrt(len(rows) / n_targets)


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
    model: Model, documents: Mapping[str, Sequence[Document]], *, stride: int | None
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """The first MAX_HEAT_MAP_TOKENS tokens of the documents of files as `annotated_text`, by name,
    and the number of tokens. Documents without a token are left out."""
    annotated: dict[str, list[dict[str, Any]]] = {}
    n_tokens = 0
    for file, of_file in documents.items():
        for number, document in enumerate(of_file, start=1):
            ids = model.tokenizer.encode(document.text).tolist()[: MAX_HEAT_MAP_TOKENS - n_tokens]
            if not ids:
                continue
            n_tokens += len(ids)
            pair = Pair((model.tokenizer.start_of_text, *ids), 1)
            losses = token_losses(model, pair, stride=stride, top=1)
            name = file if number == 1 else f"{file}, document {number:,}"
            annotated[name] = annotated_text(model.tokenizer, losses)
            if n_tokens == MAX_HEAT_MAP_TOKENS:
                return annotated, n_tokens
    return annotated, n_tokens


def sample_text_predictions(model: Model, ids: Sequence[int]) -> dict[str, Any]:
    """The content of a run's predictions.json: a sample text with the loss of each token, and flash
    cards spread evenly over it."""
    tokenizer = model.tokenizer
    losses = token_losses(model, Pair((tokenizer.start_of_text, *ids), 1))
    positions = sorted({(n + 1) * len(ids) // (N_CARDS + 1) for n in range(N_CARDS)} - {0})
    cards = [
        {
            "context": tokenizer.decode(ids[max(0, position - CARD_CONTEXT_TOKENS) : position]),
            "most_probable": [
                {"text": tokenizer.token_text(id_), "probability": p}
                for id_, p in losses[position].most_probable
            ],
            "answer": losses[position].row(tokenizer),
        }
        for position in positions
    ]
    return {"passage": annotated_text(tokenizer, losses), "cards": cards}
