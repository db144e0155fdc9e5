"""A Bloom filter: a set of hashes in few bits, with a known rate of false positives.

It never misses a hash that was added. Source: Bloom, "Space/time trade-offs in hash coding with
allowable errors", 1970. The bit positions of a hash are those of double hashing: Kirsch and
Mitzenmacher, "Less Hashing, Same Performance: Building a Better Bloom Filter", 2006. The bits are
the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.words import Hashes
from pretrain.fileio import replacing
from pretrain.rng import splitmix64

FALSE_POSITIVES = 1e-8
"""The bound in Radford et al., "Language Models are Unsupervised Multitask Learners", 2019,
section 4."""
# A filter with this rate is smallest with 27 probes (38.3 bits per hash). 16 probes need 42.1 bits,
# but save 11 cache misses per look-up.
N_PROBES = 16
# Hashes that are added at once: so few that two of them are rarely in the same word.
_BATCH = 1 << 16


class BloomFilter:
    """A set of 64-bit hashes."""

    def __init__(self, words: Hashes) -> None:
        """Take over the bits, 64 in each word; `with_capacity` creates an empty filter."""
        self._words = words

    @staticmethod
    def with_capacity(n_hashes: int, *, false_positives: float = FALSE_POSITIVES) -> BloomFilter:
        """An empty filter whose false positive rate is at most this with `n_hashes` hashes."""
        if not 0 < false_positives < 1:
            raise ValueError(f"false_positives must be between 0 and 1, not {false_positives}")
        fill = false_positives ** (1 / N_PROBES)
        n_bits = -N_PROBES * max(n_hashes, 1) / math.log1p(-fill)
        return BloomFilter(np.zeros(math.ceil(n_bits / 64), np.uint64))

    @property
    def n_bytes(self) -> int:
        return self._words.nbytes

    @property
    def false_positives(self) -> float:
        """Current false positive rate, from the fraction of bits that are set."""
        n_set = sum(int(np.unpackbits(b.view(np.uint8)).sum()) for b in _batches(self._words))
        return float((n_set / (64 * len(self._words))) ** N_PROBES)

    def add(self, hashes: Hashes) -> None:
        words = self._words
        for batch in _batches(hashes):
            for index, bit in self._probes(batch):
                # If two hashes set bits of the same word, numpy writes only one of them: repeat.
                while index.size:
                    words[index] |= bit
                    is_lost = words[index] & bit == 0
                    index, bit = index[is_lost], bit[is_lost]

    def contains(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Whether each hash was added (or is a false positive), shape (n,)."""
        flags = [np.ones(len(batch), bool) for batch in _batches(hashes)]
        for is_present, batch in zip(flags, _batches(hashes), strict=True):
            for index, bit in self._probes(batch):
                is_present &= self._words[index] & bit != 0
        return np.concatenate([np.empty(0, bool), *flags])

    def _probes(self, hashes: Hashes) -> Iterator[tuple[NDArray[np.int64], Hashes]]:
        """Yield N_PROBES times the index of a word and a bit in it, for each hash."""
        position = hashes.copy()
        step = splitmix64(hashes) | np.uint64(1)
        n_words = np.uint64(len(self._words))
        for _ in range(N_PROBES):
            index = ((position >> np.uint64(32)) * n_words) >> np.uint64(32)
            yield index.astype(np.int64), np.uint64(1) << (position & np.uint64(63))
            position += step

    def save(self, path: Path) -> None:
        """Write the bits atomically as a .npy file."""
        with replacing(path) as file:
            np.save(file, self._words)

    @staticmethod
    def open(path: Path) -> BloomFilter:
        """Map a saved filter into memory; its bits are read from the disk when they are used."""
        return BloomFilter(np.load(path, mmap_mode="r"))


def _batches(hashes: Hashes) -> Iterator[Hashes]:
    return (hashes[start : start + _BATCH] for start in range(0, len(hashes), _BATCH))
