"""log p(continuation | context) of many pairs of texts, or of ids, at once.

For each pair the result is the nats of its continuation, its number of tokens, and whether each of
them was the most probable one. A pair longer than the model's context loses the left part of its
context; a longer continuation is scored in windows that start every `stride` ids, each token
counted once. Other pairs in the batch do not change the result. An empty continuation is a
ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.batches import resolve_stride
from pretrain.distributed import World
from pretrain.evaluate.loss import EVALUATION_TOKENS
from pretrain.model.decoder import Decoder
from pretrain.tokenizer.tokenizer import Tokenizer

# Rows of logits that exist at once: 256 x 50,257 float32 are 51 MB.
LOGIT_ROWS = 256


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


@dataclass(frozen=True, slots=True)
class _Window:
    """Ids of a pair that go through the model at once; the targets are those after the last
    inputs."""

    pair: int
    inputs: tuple[int, ...]
    targets: tuple[int, ...]


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
            f"{continuation!r:.80} must be at least one token of its own after {stripped[-40:]!r}"
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
    decoder: Decoder,
    pairs: Sequence[Pair],
    *,
    world: World,
    precision: str = "fp32",
    stride: int | None = None,
    batch_tokens: int = EVALUATION_TOKENS,
) -> list[PairScore]:
    """Score each pair, in the order of the pairs. ValueError for a stride larger than the
    context."""
    context = decoder.config.window_tokens
    stride = resolve_stride(stride, context)
    windows: list[_Window] = []
    truncated: set[int] = set()
    for number, pair in enumerate(pairs):
        for start, stop, n in windows_of(pair, context_length=context, stride=stride):
            first_target = stop + 1 - n
            windows.append(_Window(number, pair.ids[start:stop], pair.ids[first_target : stop + 1]))
            if first_target == pair.n_context and start > 0:  # the pair's first window
                truncated.add(number)

    nats = [0.0] * len(pairs)
    is_greedy = [True] * len(pairs)
    for batch in _batches(windows, batch_tokens):
        with world.autocast(precision):
            scored = _score_batch(decoder, batch)
        for window, window_nats, window_is_greedy in scored:
            nats[window.pair] += window_nats
            is_greedy[window.pair] &= window_is_greedy
    return [
        PairScore(nats[i], len(pair.ids) - pair.n_context, is_greedy[i], i in truncated)
        for i, pair in enumerate(pairs)
    ]


def _batches(windows: list[_Window], batch_tokens: int) -> Iterator[list[list[_Window]]]:
    """Yield batches of rows, the longest rows first, of at most `batch_tokens` with padding.
    Windows with equal inputs share a row, such as the one-token choices of a question."""
    windows_by_inputs: dict[tuple[int, ...], list[_Window]] = {}
    for window in windows:
        windows_by_inputs.setdefault(window.inputs, []).append(window)
    rows = sorted(windows_by_inputs.values(), key=lambda row: -len(row[0].inputs))
    while rows:
        n_rows = max(1, batch_tokens // len(rows[0][0].inputs))
        yield rows[:n_rows]
        del rows[:n_rows]


def _score_batch(decoder: Decoder, rows: list[list[_Window]]) -> list[tuple[_Window, float, bool]]:
    """Each window with the nats of its targets, and whether all are the most probable ones."""
    device = decoder.device
    # Padding goes to the right: causal attention never sees it.
    inputs_BT = torch.zeros(len(rows), len(rows[0][0].inputs), dtype=torch.int64)
    for b, row in enumerate(rows):
        inputs_BT[b, : len(row[0].inputs)] = torch.tensor(row[0].inputs)
    hidden_BTD = decoder.forward(inputs_BT.to(device))

    windows = [window for row in rows for window in row]
    row_numbers = [b for b, row in enumerate(rows) for _ in row]
    hidden_ND = torch.cat(
        [
            hidden_BTD[b, len(window.inputs) - len(window.targets) : len(window.inputs)]
            for b, window in zip(row_numbers, windows, strict=True)
        ]
    )
    targets_N = torch.tensor([t for window in windows for t in window.targets], device=device)
    nats_N, is_greedy_N = _target_nats(decoder, hidden_ND, targets_N)

    lengths = [len(window.targets) for window in windows]
    return [
        (window, float(nats.sum()), bool(is_greedy.all()))
        for window, nats, is_greedy in zip(
            windows,
            nats_N.split_with_sizes(lengths),
            is_greedy_N.split_with_sizes(lengths),
            strict=True,
        )
    ]


def _target_nats(decoder: Decoder, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of each target (N), float64 on the CPU, and whether it is the most probable id (N)."""
    nats, is_greedy = [], []
    for first in range(0, len(targets_N), LOGIT_ROWS):
        targets = targets_N[first : first + LOGIT_ROWS]
        logits_NV = decoder.logits(hidden_ND[first : first + LOGIT_ROWS])
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        log_p_N1 = logits_NV.log_softmax(-1).gather(1, targets[:, None])
        nats.append(-log_p_N1[:, 0].cpu().double())
        is_greedy.append((logits_NV.argmax(-1) == targets).cpu())
    return torch.cat(nats), torch.cat(is_greedy)
