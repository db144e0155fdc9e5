"""The longest stretch of words that each of some texts has in common with a document, and where.

Texts and the documents of a corpus come in; the corpus is walked once, and only the texts are in
memory. A stretch is of REPORT_WORDS words or more: what is shorter is in any language twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.overlap import REPORT_WORDS, HashTable
from pretrain.corpus.words import Hashes, ngram_hashes, windows_of, word_hashes

# Words of a document that are looked at together.
_WINDOW_WORDS = 1 << 16


@dataclass(frozen=True, slots=True)
class Stretch:
    """Words in a row of a text that a document has too."""

    n_words: int
    first_word: int
    """Where it begins in the text."""
    document: int
    """The number of the first document that has it."""


def longest_stretches(
    texts: Sequence[str], pieces: Iterable[tuple[int, str]]
) -> list[Stretch | None]:
    """For each text the longest stretch in a corpus of documents, numbered and long ones in pieces
    as `words.windows_of` takes them; None where no REPORT_WORDS words in a row are in it."""
    grams = [ngram_hashes(word_hashes(text), REPORT_WORDS) for text in texts]
    # Places of all n-grams, with a gap between texts that no stretch goes over.
    firsts = np.cumsum([0, *(len(each) + 1 for each in grams)])
    places = np.concatenate(
        [np.empty(0, np.int64)]
        + [first + np.arange(len(each)) for first, each in zip(firsts, grams, strict=False)]
    )
    index = _Index(np.concatenate([np.empty(0, np.uint64), *grams]), places)
    longest: list[Stretch | None] = [None] * len(texts)
    # A stretch is as long as its text at most, so it lies in one of windows that overlap by that.
    overlap = max(map(len, grams), default=1) + REPORT_WORDS - 1
    for document, words in windows_of(pieces, overlap + 1):
        for start in range(0, max(1, len(words) - overlap), _WINDOW_WORDS):
            window = ngram_hashes(words[start : start + _WINDOW_WORDS + overlap], REPORT_WORDS)
            begins, lengths = _runs(*index.pairs(window))
            of_text = np.searchsorted(firsts, begins, side="right") - 1
            order = np.lexsort((begins, -lengths, of_text))
            longest_here = order[np.unique(of_text[order], return_index=True)[1]]
            for place in longest_here.tolist():
                text, n_words = int(of_text[place]), int(lengths[place]) + REPORT_WORDS - 1
                best = longest[text]
                if best is None or n_words > best.n_words:
                    first_word = int(begins[place] - firsts[text])
                    longest[text] = Stretch(n_words, first_word, document)
    return longest


class _Index:
    """Where each n-gram stands, of which some stand at several places."""

    def __init__(self, grams: Hashes, places: NDArray[np.int64]) -> None:
        self._table = HashTable([grams])
        order = np.argsort(grams, kind="stable")
        self._places = places[order]
        bounds = np.searchsorted(grams[order], self._table.hashes, side="left")
        self._bounds = np.append(bounds, len(grams))

    def pairs(self, grams: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Every pair of a number in `grams` and a place at which the same stands."""
        which, entries = self._table.pairs(grams)
        begins = self._bounds[entries]
        counts = self._bounds[entries + 1] - begins
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(which, counts), self._places[np.repeat(begins, counts) + within]


def _runs(
    which: NDArray[np.int64], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where pairs that go on by one on both sides begin, and how many there are in a row."""
    order = np.lexsort((places, places - which))
    which, places = which[order], places[order]
    is_first = np.ones(len(places), bool)
    is_first[1:] = (np.diff(places) != 1) | (np.diff(which) != 1)
    firsts = np.flatnonzero(is_first)
    return places[firsts], np.diff(firsts, append=len(places))
