"""log p(continuation | context) of many pairs of texts, or of ids, at once.

A pair longer than the model's context loses the left part of its context; a longer continuation is
scored in windows that start every `stride` ids, each token counted once. Other pairs in the batch
do not change the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.batches import resolve_stride
from pretrain.evaluate.loss import EVALUATION_TOKENS, Model
from pretrain.model.decoder import Decoder
from pretrain.tokenizer.tokenizer import Tokenizer

# Rows of logits that exist at once: 256 x 50,257 float32 are 51 MB.
LOGIT_ROWS = 256
_Targets = tuple[int, tuple[int, ...]]
"""The number of a pair, and those of its ids that are the targets of one window."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids: the first `n_context` (at least one) are context, the others are scored."""

    ids: tuple[int, ...]
    n_context: int

    def __post_init__(self) -> None:
        if not 1 <= self.n_context < len(self.ids):
            raise ValueError(
                "a pair must have at least 1 id of context and 1 of continuation (got "
                f"{self.n_context} of {len(self.ids)} ids as context)"
            )


@dataclass(frozen=True, slots=True)
class PairScore:
    """The likelihood of one continuation."""

    nats: float
    """-log p(continuation | context)"""
    tokens: int
    is_greedy: bool
    """Whether each token is the most probable one after those before it."""
    is_truncated: bool
    """Whether the context did not fit the window and lost its left part."""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Encode context and continuation as lm-evaluation-harness 0.4 does.

    White space at the end of the context moves to the continuation. Both are encoded together, and
    the continuation is what comes after the ids of the context alone. A start-of-text token comes
    first if the tokenizer's `add_bos` says so; it is the context where the context is empty.
    ValueError where the continuation adds no id.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    context_ids = tokenizer.encode_prompt(stripped)
    if stripped:
        continuation_ids = tokenizer.encode_prompt(stripped + continuation)[len(context_ids) :]
    else:
        continuation_ids = tokenizer.encode(continuation).tolist()
    if not continuation_ids:
        raise ValueError(
            "a continuation must add at least 1 token to its context (got "
            f"{continuation!r:.80} after {stripped[-40:]!r})"
        )
    return Pair((*context_ids, *continuation_ids), len(context_ids))


def windows_of(pair: Pair, *, context_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, n): ids[start:stop] are inputs of one window, and the last n of the ids
    after each input are its targets. Every id of the continuation is a target once."""
    n_ids, n_done = len(pair.ids), pair.n_context
    if n_ids - n_done <= context_length:
        yield max(0, n_ids - 1 - context_length), n_ids - 1, n_ids - n_done
        return
    start = n_done - 1
    while n_done < n_ids:
        stop = min(start + context_length, n_ids - 1)
        yield start, stop, stop + 1 - n_done
        start += stride
        n_done = stop + 1


def rolling_pairs(ids: Sequence[int], *, start: int, context_length: int) -> list[Pair]:
    """Cut a text after the id `start` into pairs that score each of its ids once, as the rolling
    log-likelihood of lm-evaluation-harness 0.4 does: windows do not overlap, except that the last
    one is as long as the others and scores only the ids that they left."""
    all_ids = (start, *ids)
    pairs = []
    for n_done in range(0, len(ids), context_length):
        last = min(n_done + context_length, len(ids))
        first = max(0, last - context_length)
        pairs.append(Pair(all_ids[first : last + 1], 1 + n_done - first))
    return pairs


@torch.no_grad()
def score_pairs(
    model: Model,
    pairs: Sequence[Pair],
    *,
    stride: int | None = None,
    batch_tokens: int = EVALUATION_TOKENS,
) -> list[PairScore]:
    """Score each pair, in the order of the pairs. ValueError for a stride larger than the
    context."""
    context = model.decoder.config.window_tokens
    stride = resolve_stride(stride, context)
    # Windows with equal inputs share a row, such as the one-token choices of a question.
    targets_by_inputs: dict[tuple[int, ...], list[_Targets]] = {}
    truncated: set[int] = set()
    for number, pair in enumerate(pairs):
        for start, stop, n in windows_of(pair, context_length=context, stride=stride):
            first = stop + 1 - n
            targets = number, pair.ids[first : stop + 1]
            targets_by_inputs.setdefault(pair.ids[start:stop], []).append(targets)
            if first == pair.n_context and start > 0:  # the pair's first window
                truncated.add(number)

    nats = [0.0] * len(pairs)
    is_greedy = [True] * len(pairs)
    # The longest rows first, in batches of at most `batch_tokens` with padding.
    rows = sorted(targets_by_inputs.items(), key=lambda row: -len(row[0]))
    while rows:
        n_rows = max(1, batch_tokens // len(rows[0][0]))
        with model.world.autocast(model.precision):
            scored = _score_rows(model.decoder, rows[:n_rows])
        for number, target_nats, target_is_greedy in scored:
            nats[number] += target_nats
            is_greedy[number] &= target_is_greedy
        del rows[:n_rows]
    return [
        PairScore(nats[i], len(pair.ids) - pair.n_context, is_greedy[i], i in truncated)
        for i, pair in enumerate(pairs)
    ]


def _score_rows(
    decoder: Decoder, rows: list[tuple[tuple[int, ...], list[_Targets]]]
) -> list[tuple[int, float, bool]]:
    """For each window the number of its pair, the nats of its targets, which are those after the
    last inputs of its row, and whether all of them are the most probable ids."""
    # Padding goes to the right: causal attention never sees it.
    inputs_BT = torch.zeros(len(rows), len(rows[0][0]), dtype=torch.int64)
    for b, (inputs, _) in enumerate(rows):
        inputs_BT[b, : len(inputs)] = torch.tensor(inputs)
    hidden_BTD = decoder.forward(inputs_BT.to(decoder.device))

    windows = [(b, targets) for b, (_, of_row) in enumerate(rows) for targets in of_row]
    ends = [len(inputs) for inputs, _ in rows]
    hidden = [hidden_BTD[b, ends[b] - len(targets) : ends[b]] for b, (_, targets) in windows]
    targets_N = torch.tensor([id_ for _, (_, targets) in windows for id_ in targets])
    nats, is_greedy = [], []
    for logits_NV, chunk_N in logit_chunks(decoder, torch.cat(hidden), targets_N):
        nats.append(-logits_NV.log_softmax(-1).gather(1, chunk_N[:, None])[:, 0].cpu().double())
        is_greedy.append((logits_NV.argmax(-1) == chunk_N).cpu())

    lengths = [len(targets) for _, (_, targets) in windows]
    parts = (torch.cat(each).split_with_sizes(lengths) for each in (nats, is_greedy))
    return [
        (pair, float(nats_N.sum()), bool(is_greedy_N.all()))
        for (_, (pair, _)), nats_N, is_greedy_N in zip(windows, *parts, strict=True)
    ]


def logit_chunks(
    decoder: Decoder, hidden_ND: Tensor, targets_N: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (n, V), in float32 or more, and their targets (n), LOGIT_ROWS at a time."""
    targets_N = targets_N.to(hidden_ND.device)
    for hidden_nD, targets_n in zip(
        torch.split(hidden_ND, LOGIT_ROWS), torch.split(targets_N, LOGIT_ROWS), strict=True
    ):
        logits_nV = decoder.logits(hidden_nD)
        yield logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)), targets_n
