"""Several sources in one order: which source and which window of it is sample number s, and the
reverse.

Samples come in blocks of BLOCK_SAMPLES; in each block a source has the same number of samples, by
its share, and a keyed bijection says where. So the shares are a setting of a run, not of the ids: a
change of them needs no new preparation. Each source is visited in an `Order` of its own, epoch
after epoch. A stage is a part of the run with shares of its own; a source of several stages goes on
where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pretrain.data.order import Order
from pretrain.rng import FeistelPermutation

BLOCK_SAMPLES = 1024


@dataclass(frozen=True, slots=True)
class Portion:
    """The ids of one source in a stream."""

    source: str
    start: int
    """Where they begin; the id there is the end-of-text token before the first document."""
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run with its own shares."""

    first_sample: int
    counts: tuple[int, ...]
    """Samples of each portion in a block, BLOCK_SAMPLES in all."""
    before: tuple[int, ...]
    """Samples of each portion that belong to earlier stages."""


class Mixture:
    """The order of the data over several portions of a stream."""

    def __init__(
        self,
        portions: Sequence[Portion],
        *,
        stages: Sequence[tuple[int, Sequence[float]]],
        context_length: int,
        seed: int,
    ) -> None:
        """`stages` are their first samples, the first of them 0, with a weight for each portion.

        Raises ValueError for a portion that no window fits into, and for a weight too small to be
        in every block.
        """
        self.portions = tuple(portions)
        self.context_length, self.seed = context_length, seed
        self.stages: list[Stage] = []
        before = [0] * len(self.portions)
        for number, (first, weights) in enumerate(stages):
            counts = _apportioned(weights, self.portions)
            self.stages.append(Stage(first, counts, tuple(before)))
            if number + 1 < len(stages):
                # What is left of the last block is left out, so that the next stage can begin.
                n_blocks = -(-(stages[number + 1][0] - first) // BLOCK_SAMPLES)
                before = [b + n_blocks * c for b, c in zip(before, counts, strict=True)]

    @cached_property
    def orders(self) -> list[Order]:
        """The order of each portion; positions count from where it begins."""
        return [
            Order(portion.n_tokens, self.context_length, self.seed, f"source {number}")
            for number, portion in enumerate(self.portions)
        ]

    def starts(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position in the stream of the first id of each sample's window."""
        portions, indices = self._places(samples)
        starts = np.empty_like(samples)
        for number, (portion, order) in enumerate(zip(self.portions, self.orders, strict=True)):
            rows = portions == number
            starts[rows] = portion.start + order.starts(indices[rows])
        return starts

    def seen(self, n_samples: int) -> list[int]:
        """How many of the first `n_samples` samples are of each portion."""
        counts = np.zeros(len(self.portions), np.int64)
        for number, stage in enumerate(self.stages):
            following = self.stages[number + 1 :]
            end = min(n_samples, following[0].first_sample if following else n_samples)
            n_blocks, rest = divmod(max(0, end - stage.first_sample), BLOCK_SAMPLES)
            counts += n_blocks * np.array(stage.counts)
            tail = np.arange(end - rest, end, dtype=np.int64)
            counts += np.bincount(self._places(tail)[0], minlength=len(counts))
        return [int(count) for count in counts]

    def tokens(self, n_samples: int) -> dict[str, int]:
        """How many targets of the first `n_samples` samples are of each source."""
        seen = self.seen(n_samples)
        return {
            portion.source: count * self.context_length
            for portion, count in zip(self.portions, seen, strict=True)
        }

    def epochs(self, n_samples: int) -> dict[str, float]:
        """How often the first `n_samples` samples read each source."""
        return {
            portion.source: seen / order.n_windows
            for portion, order, seen in zip(
                self.portions, self.orders, self.seen(n_samples), strict=True
            )
        }

    def windows_of(self, begin: int, end: int, n_samples: int) -> Iterator[tuple[int, int]]:
        """Sample and first position of each window among the first `n_samples` samples that holds
        any of the ids [begin, end) of one document."""
        number = next(
            n for n, p in enumerate(self.portions) if p.start < begin < p.start + p.n_tokens
        )
        portion = self.portions[number]
        end = min(end, portion.start + portion.n_tokens)
        most = max(s.before[number] for s in self.stages) + n_samples
        places = self.orders[number].windows_of(begin - portion.start, end - portion.start, most)
        for index, start in places:
            sample = self._sample_of(number, index)
            if sample is not None and sample < n_samples:
                yield sample, portion.start + start

    def _places(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The portion of each sample, and its number among the samples of that."""
        portions, indices = np.empty_like(samples), np.empty_like(samples)
        firsts = np.array([stage.first_sample for stage in self.stages])
        stages = np.searchsorted(firsts, samples, side="right") - 1
        blocks = (samples - firsts[stages]) // BLOCK_SAMPLES
        for stage_number, block in sorted(set(zip(stages.tolist(), blocks.tolist(), strict=True))):
            stage = self.stages[stage_number]
            rows = (stages == stage_number) & (blocks == block)
            places = samples[rows] - stage.first_sample - block * BLOCK_SAMPLES
            places = self._bijection(stage_number, block).forward(places)
            ends = np.cumsum(stage.counts)
            found = np.searchsorted(ends, places, side="right")
            counts = np.array(stage.counts)
            portions[rows] = found
            indices[rows] = (
                np.array(stage.before)[found]
                + block * counts[found]
                + places
                - (ends - counts)[found]
            )
        return portions, indices

    def _sample_of(self, number: int, index: int) -> int | None:
        """The sample that is number `index` among those of a portion, if any is."""
        for stage_number, stage in enumerate(self.stages):
            following = self.stages[stage_number + 1 :]
            count = stage.counts[number]
            if count == 0 or index < stage.before[number]:
                continue
            if following and index >= following[0].before[number]:
                continue
            block, rest = divmod(index - stage.before[number], count)
            place = np.array([sum(stage.counts[:number]) + rest], dtype=np.int64)
            within = int(self._bijection(stage_number, block).inverse(place)[0])
            sample = stage.first_sample + block * BLOCK_SAMPLES + within
            if following and sample >= following[0].first_sample:
                return None  # it was left out at the end of its stage
            return sample
        return None

    def _bijection(self, stage: int, block: int) -> FeistelPermutation:
        return FeistelPermutation(BLOCK_SAMPLES, self.seed, f"mixture/{stage}/{block}")


def _apportioned(weights: Sequence[float], portions: Sequence[Portion]) -> tuple[int, ...]:
    """Whole numbers of samples in a block, by largest remainder."""
    total = sum(weights)
    exact = [BLOCK_SAMPLES * weight / total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: (counts[n] - exact[n], n))
    for number in by_remainder[: BLOCK_SAMPLES - sum(counts)]:
        counts[number] += 1
    for weight, count, portion in zip(weights, counts, portions, strict=True):
        if weight > 0 and count == 0:
            raise ValueError(
                f"data.source: {portion.source!r} would be {100 * weight / total:.3g} % of its "
                f"stage; the least that can be mixed is 1 sample in {BLOCK_SAMPLES}"
            )
    return tuple(counts)
