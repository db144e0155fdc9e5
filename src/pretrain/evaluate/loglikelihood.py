"""The primitive: log p(continuation | context), for pairs of texts or of ids, many at once.

Pairs come in, and for each the nats of its continuation, its tokens, and whether each was the
likeliest come out, in the order of the pairs. A pair that is longer than the model's context loses
the left of its context; a continuation that is longer goes on in windows that begin every `stride`
ids, each of its tokens counted once. What stands beside a pair in a batch changes nothing of it. A
continuation of no ids is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.batches import resolve_stride
from pretrain.distributed import World
from pretrain.evaluate.loss import EVALUATION_TOKENS
from pretrain.model import Decoder
from pretrain.tokenizer import Tokenizer

# Rows of logits that exist at once: 256 x 50,257 float32 are 51 MB.
LOGIT_ROWS = 256


@dataclass(frozen=True, slots=True)
class Pair:
    """Ids, of which the first `n_context` (at least one) are given and the rest is asked for."""

    ids: tuple[int, ...]
    n_context: int


@dataclass(frozen=True, slots=True)
class PairScore:
    """What the model says of one continuation."""

    nats: float
    """-log p(continuation | context)"""
    tokens: int
    is_greedy: bool
    """Whether each of its tokens is the likeliest after the ones before."""
    is_cut: bool
    """Whether the context did not fit and lost its left."""


@dataclass(frozen=True, slots=True)
class _Window:
    """Some of a pair's ids that go through the model at once; the last `counted` are targets."""

    pair: int
    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Ids of two texts that stand side by side, as lm-evaluation-harness 0.4 has them.

    White space at the end of the context belongs to the continuation; both are encoded together,
    and the continuation is what lies beyond the ids of the context alone. Whether start_of_text
    stands before them is the tokenizer's `begins_texts`; it is all the context where there is no
    other. ValueError where the continuation has no ids of its own.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    given = tokenizer.encode_prompt(kept)
    if kept:
        asked = tokenizer.encode_prompt(kept + continuation)[len(given) :]
    else:
        asked = tokenizer.encode(continuation).tolist()
    if not asked:
        raise ValueError(f"{continuation!r:.80} is not a token of its own after {kept[-40:]!r}")
    return Pair((*given, *asked), len(given))


def windows_of(pair: Pair, *, context_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, n): ids[start:stop] are read at once, and of the ids that follow each the last
    n are counted; all windows together count each id of the continuation once."""
    n_ids, done = len(pair.ids), pair.n_context
    if n_ids - done <= context_length:
        yield max(0, n_ids - 1 - context_length), n_ids - 1, n_ids - done
        return
    start = done - 1
    while done < n_ids:
        stop = min(start + context_length, n_ids - 1)
        yield start, stop, stop + 1 - done
        start, done = start + stride, stop + 1


def rolled(ids: Sequence[int], *, start: int, context_length: int) -> list[Pair]:
    """A text behind a `start`, in pairs that count each of its ids once, as lm-evaluation-harness
    0.4 rolls over it: windows do not overlap, but that the last is as long as the others and counts
    only what they left."""
    whole = (start, *ids)
    pairs = []
    for done in range(0, len(ids), context_length):
        last = min(done + context_length, len(ids))
        first = max(0, last - context_length)
        pairs.append(Pair(whole[first : last + 1], 1 + done - first))
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
    """An answer for each pair. ValueError for a pair without context or continuation, and for a
    stride that does not fit the context."""
    context = decoder.config.window_tokens
    stride = resolve_stride(stride, context)
    windows: list[_Window] = []
    cut: set[int] = set()
    for number, pair in enumerate(pairs):
        if not 1 <= pair.n_context < len(pair.ids):
            raise ValueError(f"{pair.n_context} of {len(pair.ids)} ids are context; legal: 1 up")
        for start, stop, n in windows_of(pair, context_length=context, stride=stride):
            inputs, targets = pair.ids[start:stop], pair.ids[stop + 1 - n : stop + 1]
            if stop + 1 - n == pair.n_context and start:  # the first window
                cut.add(number)
            windows.append(_Window(number, inputs, targets))
    nats, greedy = [0.0] * len(pairs), [True] * len(pairs)
    for batch in _batches(windows, batch_tokens):
        with world.autocast(precision):
            found = _score_batch(decoder, batch)
        for window, part, likeliest in found:
            nats[window.pair] += part
            greedy[window.pair] &= likeliest
    return [
        PairScore(nats[n], len(p.ids) - p.n_context, greedy[n], n in cut)
        for n, p in enumerate(pairs)
    ]


def _batches(windows: list[_Window], batch_tokens: int) -> Iterator[list[list[_Window]]]:
    """Rows of windows, the longest first, padded to no more than `batch_tokens` together; windows
    of the same inputs, such as a question's answers of one token, are one row."""
    rows: dict[tuple[int, ...], list[_Window]] = {}
    for window in windows:
        rows.setdefault(window.inputs, []).append(window)
    waiting = sorted(rows.values(), key=lambda row: -len(row[0].inputs))
    while waiting:
        n_rows = max(1, batch_tokens // len(waiting[0][0].inputs))
        yield waiting[:n_rows]
        del waiting[:n_rows]


def _score_batch(decoder: Decoder, rows: list[list[_Window]]) -> list[tuple[_Window, float, bool]]:
    """Each window, the nats of its targets, and whether all are the likeliest."""
    device = decoder.device
    # Attention looks back only, so ids that fill up a row's right change nothing of it.
    inputs_BT = torch.zeros(len(rows), len(rows[0][0].inputs), dtype=torch.int64)
    for b, row in enumerate(rows):
        inputs_BT[b, : len(row[0].inputs)] = torch.tensor(row[0].inputs)
    hidden_BTD = decoder.forward(inputs_BT.to(device))
    windows = [(b, window) for b, row in enumerate(rows) for window in row]
    hidden_ND = torch.cat(
        [hidden_BTD[b, len(w.inputs) - len(w.targets) : len(w.inputs)] for b, w in windows]
    )
    targets_N = torch.tensor([t for _, w in windows for t in w.targets], device=device)
    nats_N, likeliest_N = _nats_of(decoder, hidden_ND, targets_N)
    lengths = [len(w.targets) for _, w in windows]
    parts = zip(
        windows,
        nats_N.split_with_sizes(lengths),
        likeliest_N.split_with_sizes(lengths),
        strict=True,
    )
    return [(w, float(nats.sum()), bool(likeliest.all())) for (_, w), nats, likeliest in parts]


def _nats_of(decoder: Decoder, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of each target (N), in float64 on the CPU, and whether it is the likeliest (N)."""
    nats, likeliest = [], []
    for first in range(0, len(targets_N), LOGIT_ROWS):
        targets = targets_N[first : first + LOGIT_ROWS]
        logits_NV = decoder.logits(hidden_ND[first : first + LOGIT_ROWS])
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        chosen_N1 = logits_NV.log_softmax(-1).gather(1, targets[:, None])
        nats.append(-chosen_N1[:, 0].cpu().double())
        likeliest.append((logits_NV.argmax(-1) == targets).cpu())
    return torch.cat(nats), torch.cat(likeliest)
