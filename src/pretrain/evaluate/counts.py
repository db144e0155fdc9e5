"""Counts of n-grams -> the probability of each next id: modified Kneser-Ney.

A model of order n interpolates n tables of counts with three discounts each, for n-grams that occur
once, twice and more often ("An empirical study of smoothing techniques for language modeling", Chen
and Goodman, 1999). Ids are tokens, or bytes of text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

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
