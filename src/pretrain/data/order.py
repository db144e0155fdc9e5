"""The order of the data: which window is sample number s, and the reverse, as pure functions.

A sample is one window of T + 1 ids. Sample s of a run is window `bijection(s mod W)` of epoch `s
div W`, and each epoch starts its windows at an offset of its own. Nothing is stored and nothing is
shuffled in memory: a corpus of any size costs the same, any process may ask for any sample, and the
map can be inverted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.rng import FeistelPermutation, seed_hash


@dataclass(frozen=True, slots=True)
class Order:
    """Where the windows of a stream of `n_tokens` ids lie, and in which order a run visits them."""

    n_tokens: int
    context_length: int
    seed: int
    purpose: str = ""
    """Tells orders of the same seed apart."""

    def __post_init__(self) -> None:
        if self.n_windows < 1:
            raise ValueError(
                f"a context of {self.context_length} ids does not fit a training text of "
                f"{self.n_tokens} ids; the longest that fits is {self.n_tokens // 2}"
            )

    @property
    def n_windows(self) -> int:
        """Windows in an epoch: the same number for every shift, so up to 2 T ids sit an epoch
        out."""
        return (self.n_tokens - self.context_length) // self.context_length

    def shift(self, epoch: int) -> int:
        """Where the first window of an epoch starts, in [0, T): windows are cut anew each time."""
        return seed_hash(self.seed, f"shift{self.purpose}", epoch) % self.context_length

    def _bijection(self, epoch: int) -> FeistelPermutation:
        return FeistelPermutation(self.n_windows, self.seed, f"order{self.purpose}/{epoch}")

    def starts(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position in the stream of the first id of each sample's window."""
        starts = np.empty_like(samples)
        epochs = samples // self.n_windows
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            windows = self._bijection(int(epoch)).forward(samples[rows] % self.n_windows)
            starts[rows] = windows * self.context_length + self.shift(int(epoch))
        return starts

    def sample_of(self, token: int, *, epoch: int) -> int | None:
        """The sample that has the stream's id number `token` among its inputs in `epoch`, if any
        has."""
        window = (token - self.shift(epoch)) // self.context_length
        if not 0 <= window < self.n_windows:
            return None
        return int(self.samples_at(np.array([window], dtype=np.int64), epoch=epoch)[0])

    def windows_of(self, begin: int, end: int, n_samples: int) -> Iterator[tuple[int, int]]:
        """Sample and first position of each window among the first `n_samples` samples that holds
        any of the ids [begin, end), in the order of epochs and of the text."""
        length = self.context_length
        for epoch in range(-(-n_samples // self.n_windows)):
            shift = self.shift(epoch)
            # A window holds T + 1 ids, so its last id is the next one's first.
            lowest = max(0, -((shift + length - begin) // length))
            highest = min(self.n_windows - 1, (end - 1 - shift) // length)
            windows = np.arange(lowest, highest + 1, dtype=np.int64)
            samples = self.samples_at(windows, epoch=epoch)
            for window, sample in zip(windows.tolist(), samples.tolist(), strict=True):
                if sample < n_samples:
                    yield sample, window * length + shift

    def samples_at(self, windows: NDArray[np.int64], *, epoch: int) -> NDArray[np.int64]:
        """The sample that each window of an epoch is: the inverse of what `starts` does."""
        return epoch * self.n_windows + self._bijection(epoch).inverse(windows)
