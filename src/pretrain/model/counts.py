"""Counts of n-grams -> the probability of each next id: modified Kneser-Ney.

A model of order n interpolates n tables of counts with three discounts each, for n-grams that occur
once, twice and more often ("An empirical study of smoothing techniques for language modeling", Chen
and Goodman, 1999). Ids are tokens, or bytes of text. `kneser_ney` scores ids with little memory;
`CountDecoder` is a decoder like any other, for a mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.model.config import ModelConfig
from pretrain.model.decoder import Decoder
from pretrain.model.layers import KeyValueCache

Ids = NDArray[np.integer[Any]]
Probabilities = NDArray[np.float64]

# Where a table has too few n-grams to estimate them, as in KenLM ("Scalable Modified Kneser-Ney
# Language Model Estimation", Heafield et al., 2013).
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


def kneser_ney(train: Ids, held_out: Ids, *, vocab_size: int, order: int) -> list[Probabilities]:
    """p(held_out[i] | the n - 1 ids before it) for each n from 1 to `order`, each of shape (M,)
    for M held-out ids. At the beginning, where fewer ids come before it, those are used.

    An n-gram is a number below the number of distinct n-grams of `train`: its place among them when
    they are sorted by the numbers of their first n - 1 ids and their last id. So no number has to
    hold n ids.
    """
    v = vocab_size
    numbers: Ids = np.zeros(len(train) + 1, np.int32)  # of the n-gram that ends at each place
    contexts = np.zeros(len(held_out), np.int64)  # of the held-out ids; -1 if never seen
    grams, numbers, counts = _distinct(numbers[:-1] * np.int64(v) + train)
    lower = np.full(len(held_out), 1 / v)
    by_order = []
    for n in range(1, order + 1):
        found = _places(grams, np.where(contexts < 0, -1, contexts * v + held_out))
        table = ((grams // v).astype(np.int32), found, contexts, lower)
        by_order.append(_interpolated(counts, *table))
        if n == order or n >= len(train):
            break
        # Below the highest order an n-gram counts once for each distinct id before it.
        suffixes = numbers[1:]
        grams, numbers, counts = _distinct(numbers[:-1] * np.int64(v) + train[n:])
        suffix_of_gram = np.empty(len(grams), np.int32)
        suffix_of_gram[numbers] = suffixes
        lower = _interpolated(np.bincount(suffix_of_gram, minlength=len(table[0])), *table)
        contexts = np.concatenate([[-1], found[:-1]])
    return by_order + by_order[-1:] * (order - len(by_order))  # of a text shorter than `order`


def _distinct(keys: Ids) -> tuple[Ids, Ids, Ids]:
    """The distinct keys in ascending order, the place of each key among them, and how often each
    occurs: np.unique with less memory."""
    order = np.argsort(keys, kind="stable")  # half the time of the default
    keys = keys[order]
    is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
    numbers = np.empty(len(keys), np.int32)
    numbers[order] = np.cumsum(is_first, dtype=np.int32) - 1
    firsts = np.flatnonzero(is_first)
    return keys[firsts], numbers, np.diff(firsts, append=len(keys)).astype(np.int32)


def _places(grams: Ids, queries: Ids) -> Ids:
    """The places of the queries among sorted distinct grams; -1 for those that are not there."""
    places = np.searchsorted(grams, queries).clip(max=len(grams) - 1)
    return np.where(grams[places] == queries, places, -1)


def _interpolated(
    counts: Ids, context_of_gram: Ids, found: Ids, contexts: Ids, lower: Probabilities
) -> Probabilities:
    """p of the n-grams `found` (-1: not in the table) in their `contexts` (-1: never seen), of a
    table of n-grams with their counts and contexts. `lower` is the same one order below, which
    receives the discounted mass."""
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    n_contexts = 1 + max(context_of_gram[-1], contexts.max())
    totals = np.bincount(context_of_gram, weights=counts, minlength=n_contexts)[contexts]
    freed = np.bincount(context_of_gram, weights=discounts, minlength=n_contexts)[contexts]
    kept = np.where(found < 0, 0.0, counts[found] - discounts[found])
    # The total is 0 after what occurs at an end of the text only.
    is_known = (contexts >= 0) & (totals > 0)
    return np.where(is_known, (kept + freed * lower) / np.maximum(totals, 1), lower)


def _discounts(counts: Ids) -> Probabilities:
    """What is subtracted from the counts of n-grams that occur 0, 1, 2, and 3 or more times."""
    once, twice, three, four = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
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
    def device(self) -> torch.device:
        """The device of the tables."""
        return next(self.parameters()).device

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
        return torch.stack(numbers, -1).float()  # exact below 2^24, more than MAX_COUNTED_TOKENS

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the log of the probabilities (..., V) of the next token."""
        numbers_NC = hidden.reshape(-1, self.width).long()
        p_NV = torch.full((len(numbers_NC), self.vocab_size), 1 / self.vocab_size)
        p_NV = p_NV.to(self.device)
        contexts_N = torch.zeros_like(numbers_NC[:, 0])
        for n, (keys, shares, rests) in enumerate(
            zip(self.keys, self.shares, self.rests, strict=True)
        ):
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


def count_decoder(train: Ids, config: ModelConfig, *, vocab_size: int, order: int) -> CountDecoder:
    """Count the n-grams of a text, of up to `order` ids: see `kneser_ney`."""
    v, n_contexts = vocab_size, 1
    grams, numbers, counts = _distinct(train.astype(np.int64))
    tables = []
    for n in range(1, order + 1):
        is_last = n == order or n >= len(train)
        own_grams = grams
        if not is_last:
            suffixes = numbers[1:]
            grams, numbers, higher_counts = _distinct(numbers[:-1] * np.int64(v) + train[n:])
            suffix_of_gram = np.empty(len(grams), np.int32)
            suffix_of_gram[numbers] = suffixes
            counts = np.bincount(suffix_of_gram, minlength=len(own_grams))
        contexts, discounts = own_grams // v, _discounts(counts)[np.minimum(counts, 3)]
        totals = np.bincount(contexts, weights=counts, minlength=n_contexts)
        freed = np.bincount(contexts, weights=discounts, minlength=n_contexts)
        shares = (counts - discounts) / np.maximum(totals, 1)[contexts]
        tables.append((own_grams, shares, np.where(totals > 0, freed / np.maximum(totals, 1), 1)))
        if is_last:
            break
        n_contexts, counts = len(own_grams), higher_counts
    decoder = CountDecoder(config, vocab_size=v, sizes=[len(keys) for keys, *_ in tables])
    with torch.no_grad():
        for lists, table in zip(
            zip(decoder.keys, decoder.shares, decoder.rests, strict=True), tables, strict=True
        ):
            for parameter, values in zip(lists, table, strict=True):
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return decoder.eval()
