"""Text -> 64-bit hashes of its words and word n-grams, for near-duplicates and overlaps.

The hashes are the same on every machine. Case and punctuation are ignored: a word is a run of
letters, marks and digits, in lower case. In scripts that are written without spaces each character
is a word. Every text is accepted.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pretrain.rng import splitmix64

Hashes = NDArray[np.uint64]

_CHUNK_CHARACTERS = 1 << 18
_N_MULTIPLIERS = 64
_SEPARATOR, _LETTER, _SINGLE = 0, 1, 2
"""Classes of code points: between words, in a word, a word by itself."""


def split_words(text: str) -> list[str]:
    """Split a text into its words: "The SEA, 中文!" -> ["the", "sea", "中", "文"]."""
    lowered = text.lower()
    inside, starts = _word_starts(_code_points(lowered))
    firsts = inside[starts]
    lasts = inside[np.append(starts, len(inside))[1:] - 1]
    return [lowered[i : j + 1] for i, j in zip(firsts.tolist(), lasts.tolist(), strict=True)]


def word_hashes(text: str) -> Hashes:
    """Hash each word of a text, shape (n_words,)."""
    chunks = []
    start = 0
    # In chunks of bounded size, cut at a space if there is one.
    while len(text) - start > _CHUNK_CHARACTERS:
        stop = text.rfind(" ", start + 1, start + _CHUNK_CHARACTERS)
        if stop <= start:
            stop = start + _CHUNK_CHARACTERS
        chunks.append(_hash_words(text[start:stop]))
        start = stop
    chunks.append(_hash_words(text[start:]))
    return np.concatenate(chunks)


def ngram_hashes(words: Hashes, n: int) -> Hashes:
    """Hash each `n` consecutive words, shape (n_words - n + 1,); empty for fewer words."""
    n_ngrams = len(words) - n + 1
    if n_ngrams < 1:
        return np.empty(0, np.uint64)
    sums = np.zeros(n_ngrams, np.uint64)
    for position, multiplier in enumerate(_multipliers()[:n]):
        sums += words[position : position + n_ngrams] * multiplier
    return splitmix64(sums)


def word_hash_windows(chunks: Iterable[tuple[int, str]], n: int) -> Iterator[tuple[int, Hashes]]:
    """Yield (document number, word hashes) of numbered documents, a long one in several chunks.

    Each chunk but a document's first is preceded by the last `n` - 1 words before it, so that every
    n-gram of a document is in exactly one window.
    """
    document = -1
    previous = np.empty(0, np.uint64)
    for number, text in chunks:
        words = word_hashes(text)
        if number == document:
            words = np.concatenate([previous, words])
        yield number, words
        document = number
        previous = words[max(0, len(words) - n + 1) :]


def _hash_words(text: str) -> Hashes:
    points = _code_points(text.lower())
    inside, starts = _word_starts(points)
    if not inside.size:
        return np.empty(0, np.uint64)
    # A word's hash is the sum of (letter x multiplier of its position), for all words at once.
    lengths = np.diff(starts, append=len(inside))
    positions = np.arange(len(inside)) - np.repeat(starts, lengths)
    letters = points[inside].astype(np.uint64) + np.uint64(1)
    values = letters * _multipliers()[positions % _N_MULTIPLIERS]
    return splitmix64(np.add.reduceat(values, starts))


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "replace"), dtype="<u4")


def _word_starts(points: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the code points inside words, and the positions in that list where words start."""
    classes = _character_classes()[np.minimum(points, 0x10000)]
    inside = np.flatnonzero(classes)
    classes = classes[inside]
    is_start = np.ones(len(inside), bool)
    is_start[1:] = (np.diff(inside) > 1) | (classes[1:] == _SINGLE) | (classes[:-1] == _SINGLE)
    return inside, np.flatnonzero(is_start)


@cache
def _multipliers() -> Hashes:
    """Odd pseudo-random numbers: SplitMix64 of 1, 2, 3, ... times its increment."""
    counter = np.arange(1, _N_MULTIPLIERS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return splitmix64(counter) | np.uint64(1)


@cache
def _character_classes() -> NDArray[np.uint8]:
    """The class of each code point up to U+FFFF, and of all others as the last element."""
    classes = np.zeros(0x10001, np.uint8)
    for point in range(0x10000):
        if unicodedata.category(chr(point))[0] in "LMN":
            classes[point] = _LETTER
    # Thai to Khmer, and Kana, Han, Yi: no spaces between words. Beyond U+FFFF: more Han, and emoji.
    for first, last in ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0xA4CF)):
        letters = classes[first : last + 1]
        letters[letters == _LETTER] = _SINGLE
    classes[0xF900:0xFB00] = _SINGLE
    classes[0x10000] = _SINGLE
    return classes
