"""Text -> hashes of its words and of n words in a row: what near-duplicates and overlaps are told
by.

A text comes in, uint64 hashes go out, the same on every machine. Case and punctuation do not count:
a word is a run of letters, marks and digits, lower-cased. Scripts that are written without spaces
give a word a character. Nothing is refused.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_CHUNK_CHARACTERS = 1 << 18
_N_MULTIPLIERS = 64
_SEPARATOR, _LETTER, _ALONE = 0, 1, 2


def word_hashes(text: str) -> Hashes:
    """A 64-bit hash of each word of a text, shape (n_words,)."""
    found = [_hash_chunk(chunk) for chunk in _chunks(text)]
    return np.concatenate(found) if len(found) != 1 else found[0]


def ngram_hashes(words: Hashes, n: int) -> Hashes:
    """A 64-bit hash of each `n` words in a row, shape (n_words - n + 1,), empty for fewer words."""
    count = len(words) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    found = np.zeros(count, np.uint64)
    for place, multiplier in enumerate(_multipliers()[:n]):
        found += words[place : place + count] * multiplier
    return mixed(found)


def split_words(text: str) -> list[str]:
    """The words of a text as they are hashed."""
    lowered = text.lower()
    inside, starts = _bounds(_points(lowered))
    stops = np.append(starts, len(inside))[1:] - 1
    bounds = zip(inside[starts].tolist(), inside[stops].tolist(), strict=True)
    return [lowered[first : last + 1] for first, last in bounds]


def word_hash_windows(pieces: Iterable[tuple[int, str]], n: int) -> Iterator[tuple[int, Hashes]]:
    """Hashes of the words of numbered documents, of which a long one may come in pieces: each but
    its first begins with the last `n` - 1 words before it, so that every `n` in a row are once in
    a window."""
    document, before = -1, np.empty(0, np.uint64)
    for number, text in pieces:
        words = word_hashes(text)
        if number == document:
            words = np.concatenate([before, words])
        yield number, words
        document, before = number, words[max(0, len(words) - n + 1) :]


def _hash_chunk(text: str) -> Hashes:
    points = _points(text.lower())
    inside, starts = _bounds(points)
    if not inside.size:
        return np.empty(0, np.uint64)
    lengths = np.diff(starts, append=len(inside))
    # The sum of letter times a multiplier of its place: one pass over all words at once.
    places = np.arange(len(inside)) - np.repeat(starts, lengths)
    values = (points[inside].astype(np.uint64) + np.uint64(1)) * _multipliers()[
        places % _N_MULTIPLIERS
    ]
    return mixed(np.add.reduceat(values, starts))


def _points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "replace"), dtype="<u4")


def _bounds(points: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which code points are in words, and the places in that list where words begin: where the
    neighbour on the left is none of the word's letters."""
    kinds = _kinds()[np.minimum(points, 0x10000)]
    inside = np.flatnonzero(kinds)
    inner = kinds[inside]
    begins = np.ones(len(inside), bool)
    begins[1:] = (np.diff(inside) > 1) | (inner[1:] == _ALONE) | (inner[:-1] == _ALONE)
    return inside, np.flatnonzero(begins)


def _chunks(text: str) -> Iterator[str]:
    """A text in parts of bounded length, cut at spaces."""
    start = 0
    while len(text) - start > _CHUNK_CHARACTERS:
        stop = text.rfind(" ", start + 1, start + _CHUNK_CHARACTERS)
        stop = stop if stop > start else start + _CHUNK_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def mixed(values: Hashes) -> Hashes:
    """Numbers of which every bit depends on every bit of those given, one to one: the finalizer of
    SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _multipliers() -> Hashes:
    """Odd numbers without a pattern: what splitmix64 makes of 1, 2, 3, ..."""
    counter = np.arange(1, _N_MULTIPLIERS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mixed(counter) | np.uint64(1)


@cache
def _kinds() -> NDArray[np.uint8]:
    """What a code point is to a word, one entry for all beyond U+FFFF."""
    kinds = np.zeros(0x10001, np.uint8)
    for point in range(0x10000):
        if unicodedata.category(chr(point))[0] in "LMN":
            kinds[point] = _LETTER
    # Thai to Khmer, and Kana, Han, Yi: no spaces between words. Beyond: Han again, and emoji.
    for first, last in ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0xA4CF)):
        letters = kinds[first : last + 1]
        letters[letters == _LETTER] = _ALONE
    kinds[0xF900:0xFB00] = _ALONE
    kinds[0x10000] = _ALONE
    return kinds
