"""Counts of n-grams -> the probability of each next id: modified Kneser-Ney.

A model of order n interpolates n tables of counts with three discounts each, for n-grams that occur
once, twice and more often ("An empirical study of smoothing techniques for language modeling", Chen
and Goodman, 1999). Ids are tokens, or bytes of text. `kneser_ney` scores ids with little memory;
`CountDecoder` is a decoder like any other, for a mix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.machine import memory_bytes
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import Decoder
from pretrain.model.layers import KeyValueCache

Ids = NDArray[np.integer[Any]]
Probabilities = NDArray[np.float64]

# The first tokens of a text that are counted, and the memory that one takes meanwhile: 62 to 92
# bytes of Wikipedia, 116 of a text without any order.
MAX_COUNTED_TOKENS, BYTES_PER_TOKEN = 1 << 25, 92
# Of a text of more tokens, n-grams of 4 tokens or more that occur once are left out: two thirds of
# the memory. Of 20 million tokens of Wikipedia the mean with a network lost 0.008 bits per byte of
# the 0.056 that counts had taken off.
WHOLE_TOKENS = 10_000_000
RARE_LENGTH = 4
# Hidden states have the numbers of n-grams in float32. No more of MAX_COUNTED_TOKENS occur twice.
_MOST_NUMBERS = 1 << 24
# Where a table has too few n-grams to estimate them, as in KenLM ("Scalable Modified Kneser-Ney
# Language Model Estimation", Heafield et al., 2013).
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
# N-grams that are smoothed at a time: what is not in memory at once.
_SLICE = 1 << 22


def kneser_ney(train: Ids, held_out: Ids, *, vocab_size: int, order: int) -> list[Probabilities]:
    """p(held_out[i] | the n - 1 ids before it) for each n from 1 to `order`, each of shape (M,)
    for M held-out ids. At the beginning, where fewer ids come before it, those are used."""
    contexts = np.zeros(len(held_out), np.int64)  # of the held-out ids; -1 if never seen
    n_contexts, lower, by_order = 1, np.full(len(held_out), 1 / vocab_size), []
    for keys, counts, continuations in _tables(train, vocab_size, order):
        found = _places(keys, np.where(contexts < 0, -1, contexts * vocab_size + held_out))
        for each in (counts, continuations):  # as the highest order, and below a higher one
            if each is None:
                break
            shares, rests = _smoothed(keys, each, vocab_size, n_contexts)
            rest = np.where(contexts < 0, 1.0, rests[contexts])
            p = np.where(found < 0, 0.0, shares[found]) + rest * lower
            by_order += [p] if each is counts else []
        n_contexts, lower, contexts = len(keys), p, np.concatenate([[-1], found[:-1]])
    return by_order + by_order[-1:] * (order - len(by_order))  # of a text shorter than `order`


def n_counted(n_tokens: int) -> int:
    """Return how many of a text's tokens are counted: in a third of this machine's memory."""
    most = (memory_bytes() or 1 << 40) // (3 * BYTES_PER_TOKEN)
    return min(n_tokens, MAX_COUNTED_TOKENS, most)


def longest_counted(vocab_size: int) -> int:
    """Return the length of the longest n-grams that can be counted: as numbers of 63 bits."""
    return next(n for n in range(16, 0, -1) if (vocab_size + 1) ** n < 1 << 63)


def check_counts(name: str, counts: int, vocab_size: int) -> None:
    """ValueError for n-grams that are longer than `longest_counted`."""
    if counts > (most := longest_counted(vocab_size)):
        raise ValueError(
            f"{name} is {counts}; it must be at most {most}: of a vocabulary of {vocab_size:,} no "
            "more tokens in a row can be counted"
        )


def _tables(train: Ids, vocab_size: int, order: int) -> Iterator[tuple[Ids, Ids, Ids | None]]:
    """Yield for each n from 1 the keys of the distinct n-grams, in ascending order, how often each
    occurs, and, unless n is the last, the number of distinct ids before it.

    The key of an n-gram is the place of its first n - 1 ids among the shorter ones, times
    vocab_size, plus its last id. All come from one sort: of `order` ids at each place, as a number.
    """
    order = min(order, len(train), longest_counted(vocab_size))
    end, radix = vocab_size, vocab_size + 1  # what comes after the text is an id of its own
    codes, counts = np.zeros(len(train), np.int64), np.ones(len(train), np.int32)
    for first in range(order):
        codes *= radix
        codes[: len(train) - first] += train[first:]
        codes[len(train) - first :] += end
    codes.sort()
    levels = []
    for _ in range(order):
        firsts = _firsts(codes)
        codes, counts = codes[firsts], np.add.reduceat(counts, firsts, dtype=np.int32)
        levels.append((codes, counts))
        codes = codes // radix
    del codes, counts, firsts

    shorter = np.zeros(1, np.int64)
    while levels:
        codes, counts = levels.pop()
        is_there = codes % radix != end
        codes, counts = codes[is_there], counts[is_there]
        keys = np.searchsorted(shorter, codes // radix)
        keys *= vocab_size
        keys += codes % radix
        continuations = None
        if levels:
            longer, shorter = levels[-1][0], codes
            suffixes = longer[longer % radix != end]
            suffixes %= radix ** (order - len(levels))
            continuations = _occurrences(codes, suffixes)
            del longer, suffixes
        del codes, is_there
        yield keys, counts, continuations
        del keys, counts, continuations


def _firsts(ascending: Ids) -> Ids:
    """The place of the first of each run of equal numbers."""
    is_first = np.ones(len(ascending), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=is_first[1:])
    return np.flatnonzero(is_first)


def _occurrences(ascending: Ids, numbers: Ids) -> Ids:
    """How often each of some distinct numbers is among others, which are sorted."""
    numbers.sort()
    firsts = _firsts(numbers)
    counts = np.zeros(len(ascending), np.int32)
    counts[np.searchsorted(ascending, numbers[firsts])] = np.diff(firsts, append=len(numbers))
    return counts


def _places(grams: Ids, queries: Ids) -> Ids:
    """The places of the queries among sorted distinct grams; -1 for those that are not there."""
    places = np.searchsorted(grams, queries).clip(max=len(grams) - 1)
    return np.where(grams[places] == queries, places, -1)


def _smoothed(
    keys: Ids,
    counts: Ids,
    vocab_size: int,
    n_contexts: int,
    is_kept: NDArray[np.bool_] | None = None,
) -> tuple[Probabilities, Probabilities]:
    """Of n-grams with these keys and counts: the share of its context's probability that each, or
    each that is kept, has of its own, and for each context the rest, which goes to the shorter
    n-grams."""
    by_count = _discounts(counts)

    def slices() -> Iterator[tuple[Ids, Ids, Probabilities, Any]]:
        """Contexts and counts of some n-grams, what these give away, and which of them are kept."""
        for first in range(0, len(keys), _SLICE):
            part = slice(first, first + _SLICE)
            given = by_count[np.minimum(counts[part], 3)]
            kept: Any = slice(None) if is_kept is None else is_kept[part]
            if is_kept is not None:
                np.copyto(given, counts[part], where=~kept)
            yield keys[part] // vocab_size, counts[part], given, kept

    totals, rests = np.zeros(n_contexts), np.zeros(n_contexts)
    for contexts, own, given, _ in slices():
        span, places = slice(contexts[0], contexts[-1] + 1), contexts - contexts[0]
        totals[span] += np.bincount(places, weights=own)
        rests[span] += np.bincount(places, weights=given)
    rests[totals == 0] = 1.0  # after what occurs at an end of the text only
    np.maximum(totals, 1, out=totals)
    rests /= totals
    shares = [((own - given) / totals[contexts])[kept] for contexts, own, given, kept in slices()]
    return np.concatenate(shares), rests


def _discounts(counts: Ids) -> Probabilities:
    """What is subtracted from the counts of n-grams that occur 0, 1, 2, and 3 or more times."""
    once, twice, three, four = (np.count_nonzero(counts == times) for times in (1, 2, 3, 4))
    discounts = FALLBACK_DISCOUNTS
    if once and twice and three:
        y = once / (once + 2 * twice)
        estimated = (y, 2 - 3 * y * three / twice, 3 - 4 * y * four / three)
        if min(estimated) > 0:
            discounts = estimated
    return np.array([0.0, *discounts])


class CountDecoder(Decoder):
    """The counts of a text, with the interface of a decoder: its weights are tables of n-grams.

    A table of n-grams has their keys (the number of the first n - 1 ids among the shorter n-grams,
    times V, plus the last id), the share of its context's probability that each has of its own, and
    for each context the rest, which goes to the shorter n-grams. A hidden state has the numbers of
    the n-grams that end there, of each length, or -1. It predicts and is not trained.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, sizes: Sequence[int]) -> None:
        """`sizes` are the numbers of n-grams of the lengths 1, 2, ...; `config` has the window."""
        nn.Module.__init__(self)
        self.config, self.vocab_size, self.width = config, vocab_size, max(1, len(sizes) - 1)

        def parameters(sizes: Sequence[int], dtype: torch.dtype) -> nn.ParameterList:
            tensors = [torch.zeros(size, dtype=dtype) for size in sizes]
            return nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in tensors)

        self.keys = parameters(sizes, torch.int64)
        self.shares = parameters(sizes, torch.float32)
        self.rests = parameters([1, *sizes[:-1]], torch.float32)

    @property
    def tables(self) -> tuple[nn.ParameterList, nn.ParameterList, nn.ParameterList]:
        """Keys, shares and rests of each length."""
        return self.keys, self.shares, self.rests

    def forward(self, ids_BT: Tensor, *, cache: KeyValueCache | None = None, **_: Any) -> Tensor:
        """Compute the numbers (B, T, N) of the n-grams that end at each position."""
        T = ids_BT.shape[1]
        previous_BS = ids_BT[:, :0] if cache is None else cache.append_ids(ids_BT)
        ids_BS = torch.cat([previous_BS[:, max(0, previous_BS.shape[1] - self.width) :], ids_BT], 1)
        numbers_BS = torch.zeros_like(ids_BS)
        numbers = []
        for keys in list(self.keys)[: self.width]:
            numbers_BS = _find(keys, numbers_BS, ids_BS, self.vocab_size)
            numbers.append(numbers_BS[:, -T:])
            numbers_BS = nn.functional.pad(numbers_BS[:, :-1], (1, 0), value=-1)
        return torch.stack(numbers, -1).float()  # exact below _MOST_NUMBERS

    def target_probabilities(self, hidden_NC: Tensor, targets_N: Tensor) -> Tensor:
        """Compute the probability (N,) of one next token after each hidden state (N, C)."""
        p_N = torch.full(targets_N.shape, 1 / self.vocab_size, device=hidden_NC.device)
        contexts_N = torch.zeros_like(targets_N)
        for n, (keys, shares, rests) in enumerate(zip(*self.tables, strict=True)):
            entries_N = _find(keys, contexts_N, targets_N, self.vocab_size)
            own_N = torch.where(entries_N < 0, 0.0, shares[entries_N])
            p_N = torch.where(contexts_N < 0, p_N, own_N + rests[contexts_N] * p_N)
            if n < self.width:
                contexts_N = hidden_NC[:, n].long()
        return p_N

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the log of the probabilities (..., V) of the next token."""
        numbers_NC = hidden.reshape(-1, self.width).long()
        p_NV = numbers_NC.new_full(
            (len(numbers_NC), self.vocab_size), 1 / self.vocab_size, dtype=torch.float32
        )
        contexts_N = torch.zeros_like(numbers_NC[:, 0])
        for n, (keys, shares, rests) in enumerate(zip(*self.tables, strict=True)):
            rows = (contexts_N >= 0).nonzero()[:, 0]
            known = contexts_N[rows]
            first = torch.searchsorted(keys, known * self.vocab_size)
            length = torch.searchsorted(keys, (known + 1) * self.vocab_size) - first
            p_NV[rows] *= rests[known][:, None]
            # All entries of the contexts, one after the other.
            row = torch.repeat_interleave(rows, length)
            start = torch.repeat_interleave(first - length.cumsum(0) + length, length)
            entry = start + torch.arange(len(row), device=row.device)
            p_NV[row, keys[entry] % self.vocab_size] += shares[entry]
            if n < self.width:
                contexts_N = numbers_NC[:, n]
        return p_NV.log().view(*hidden.shape[:-1], self.vocab_size)


def _find(keys: Tensor, contexts: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """The places among sorted keys of the n-grams of contexts (-1: none) and their last ids."""
    queries = torch.where(contexts < 0, -1, contexts * vocab_size + ids)
    places = torch.searchsorted(keys, queries).clamp(max=len(keys) - 1)
    return torch.where(keys[places] == queries, places, -1)


def count_decoder(
    train: Ids,
    config: ModelConfig,
    *,
    vocab_size: int,
    order: int,
    whole_tokens: int = WHOLE_TOKENS,
) -> CountDecoder:
    """Count the n-grams of a text, of up to `order` ids or `longest_counted`: see `kneser_ney`. Of
    more than `whole_tokens` ids rare ones are left out, and their probability goes to the shorter
    n-grams."""
    tables: list[tuple[NDArray[Any], ...]] = []
    places = np.zeros(1, np.int64)  # of the n-grams one shorter, among those that are kept
    rare_length = RARE_LENGTH
    for n, (keys, counts, continuations) in enumerate(_tables(train, vocab_size, order), 1):
        used = counts if continuations is None else continuations
        if len(train) <= whole_tokens:
            shares, rests = _smoothed(keys, used, vocab_size, len(places))
            places = np.zeros(len(keys), np.int8)  # only their number matters
        else:
            # What begins a kept n-gram is kept too: it occurs as often, or more often.
            if len(keys) > _MOST_NUMBERS:
                rare_length = min(n, rare_length)
            is_kept = (counts > 1) | (n < rare_length)
            shares, rests = _smoothed(keys, used, vocab_size, len(places), is_kept)
            keys, rests = keys[is_kept], rests[places >= 0]
            keys = places[keys // vocab_size] * vocab_size + keys % vocab_size
            places = np.where(is_kept, np.cumsum(is_kept) - 1, -1)
        if not len(keys):  # all are rare
            break
        tables.append((keys, shares.astype(np.float32), rests.astype(np.float32)))
        del keys, counts, continuations, used, shares, rests
    sizes = [len(keys) for keys, *_ in tables]
    decoder = CountDecoder(config, vocab_size=vocab_size, sizes=sizes)
    with torch.no_grad():
        for number, values in enumerate(zip(*tables, strict=True)):
            for own, each in zip(decoder.tables[number], values, strict=True):
                own.copy_(torch.from_numpy(each))
    return decoder.eval()
