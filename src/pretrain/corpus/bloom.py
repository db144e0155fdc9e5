"""A set of hashes in fewer bits than they have: what was put in is always found, and something else
as rarely as was asked.

Hashes of any number go in, flags come out: the filter of Bloom, "Space/time trade-offs in hash
coding with allowable errors", 1970. The places of a hash are a sum of two hashes, see Kirsch and
Mitzenmacher, "Less Hashing, Same Performance: Building a Better Bloom Filter", 2006. The same bits
on every machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.words import Hashes, mixed

FALSE_POSITIVES = 1e-8
"""What Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 4,
bound it by."""
# With 27 a filter of that rate is smallest, 38.3 bits a hash; 16 need 42.1, and 11 places less to
# look at, each of which is a miss of the processor's cache.
N_PLACES = 16
# Hashes at once: so few that two of them seldom meet in a word.
_BATCH = 1 << 16


class BloomFilter:
    """Hashes that were put in, and a few others."""

    def __init__(self, words: Hashes) -> None:
        """From its bits, 64 a word; `sized` makes an empty one."""
        self._words = words

    @staticmethod
    def sized(n_hashes: int, *, false_positives: float = FALSE_POSITIVES) -> BloomFilter:
        """An empty one that finds what is not there at most so often once it holds `n_hashes`."""
        if not 0 < false_positives < 1:
            raise ValueError(f"false positives are {false_positives}; legal: between 0 and 1")
        fill = false_positives ** (1 / N_PLACES)
        n_bits = -N_PLACES * max(n_hashes, 1) / math.log1p(-fill)
        return BloomFilter(np.zeros(math.ceil(n_bits / 64), np.uint64))

    @property
    def n_bytes(self) -> int:
        return self._words.nbytes

    @property
    def false_positives(self) -> float:
        """How often a hash is found that is not there, from the share of bits that are set."""
        n_set = sum(int(np.unpackbits(part.view(np.uint8)).sum()) for part in _parts(self._words))
        return float((n_set / (64 * len(self._words))) ** N_PLACES)

    def add(self, hashes: Hashes) -> None:
        words = self._words
        for part in _parts(hashes):
            for place, bit in self._places(part):
                # Of two that meet in a word only one is written at once.
                while place.size:
                    words[place] |= bit
                    is_lost = words[place] & bit == 0
                    place, bit = place[is_lost], bit[is_lost]

    def holds(self, hashes: Hashes) -> NDArray[np.bool_]:
        """For each hash whether it was put in, shape (n,)."""
        found = np.ones(len(hashes), bool)
        for start, part in zip(range(0, len(hashes), _BATCH), _parts(hashes), strict=True):
            for place, bit in self._places(part):
                found[start : start + _BATCH] &= self._words[place] & bit != 0
        return found

    def _places(self, hashes: Hashes) -> Iterator[tuple[NDArray[np.int64], Hashes]]:
        """The word and the bit in it, N_PLACES times for each hash."""
        place, step = hashes.copy(), mixed(hashes) | np.uint64(1)
        n_words = np.uint64(len(self._words))
        for _ in range(N_PLACES):
            word = ((place >> np.uint64(32)) * n_words) >> np.uint64(32)
            yield word.astype(np.int64), np.uint64(1) << (place & np.uint64(63))
            place += step

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        with open(unfinished, "wb") as file:
            np.save(file, self._words)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    @staticmethod
    def open(path: Path) -> BloomFilter:
        """A saved one; its bits stay on the disk until they are looked at."""
        return BloomFilter(np.load(path, mmap_mode="r"))


def _parts(hashes: Hashes) -> Iterator[Hashes]:
    return (hashes[start : start + _BATCH] for start in range(0, len(hashes), _BATCH))
