"""The order of the training text: which window is sample number s, and the inverse.

A sample is one window of T + 1 token ids. `Order` is the order of one text, `MixtureOrder` that of
several sources with weights, `batch_of_step` says which batch a training step reads, and `Tracer`
which documents are in it. All are pure functions of the seed: nothing is stored and nothing is
shuffled in memory, so a text of any size costs the same, any process can compute any sample, and
every map can be inverted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from pretrain.rng import FeistelPermutation, seed_hash

Indices = NDArray[np.int64]

BLOCK_SAMPLES = 1024
"""Samples of a block of a mixture; every block has the same number of samples of each source."""
_NEVER = 1 << 62


def ceil_div(a: int, b: int) -> int:
    """Divide integers and round up."""
    return (a + b - 1) // b


@dataclass(frozen=True, slots=True)
class Order:
    """The order in which a run reads the windows of a text of `n_tokens` ids.

    An epoch of W windows reads every window once, in the order of a keyed permutation. Its first
    window starts at an offset of its own, so that the text is cut at other places in each epoch.
    """

    n_tokens: int
    context_length: int
    seed: int
    purpose: str = ""
    """Distinguishes orders of the same seed."""

    def __post_init__(self) -> None:
        if self.n_windows < 1:
            raise ValueError(
                f"a context of {self.context_length} ids does not fit a training text of "
                f"{self.n_tokens} ids; the longest that fits is {self.n_tokens // 2}"
            )

    @property
    def n_windows(self) -> int:
        """Windows of an epoch: the same number for every offset, so up to 2 T ids are left out of
        an epoch."""
        return (self.n_tokens - self.context_length) // self.context_length

    def epoch_offset(self, epoch: int) -> int:
        """Position of the first window of an epoch, in [0, T)."""
        return seed_hash(self.seed, f"shift{self.purpose}", epoch) % self.context_length

    def _permutation(self, epoch: int) -> FeistelPermutation:
        return FeistelPermutation(self.n_windows, self.seed, f"order{self.purpose}/{epoch}")

    def window_starts(self, samples: Indices) -> Indices:
        """Position in the text of the first id of each sample's window."""
        starts = np.empty_like(samples)
        epochs = samples // self.n_windows
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            windows = self._permutation(epoch).forward(samples[rows] % self.n_windows)
            starts[rows] = windows * self.context_length + self.epoch_offset(epoch)
        return starts

    def windows_containing(self, begin: int, end: int, n_samples: int) -> Iterator[tuple[int, int]]:
        """Yield sample and first position of each window with any of the ids [begin, end), among
        the first `n_samples` samples: the inverse of `window_starts`.

        They come in the order of epochs and, in an epoch, of the text.
        """
        length = self.context_length
        for epoch in range(ceil_div(n_samples, self.n_windows)):
            offset = self.epoch_offset(epoch)
            # A window has T + 1 ids, so its last id is the first one of the next window.
            first = max(0, ceil_div(begin - offset - length, length))
            last = min(self.n_windows - 1, (end - 1 - offset) // length)
            windows = np.arange(first, last + 1, dtype=np.int64)
            samples = epoch * self.n_windows + self._permutation(epoch).inverse(windows)
            for window, sample in zip(windows.tolist(), samples.tolist(), strict=True):
                if sample < n_samples:
                    yield sample, window * length + offset


@dataclass(frozen=True, slots=True)
class SourceSpan:
    """The ids of one source inside a text of several sources."""

    source: str
    start: int
    """Position of the first id, the end-of-text token before the first document."""
    n_tokens: int


@dataclass(frozen=True, slots=True)
class MixtureStage:
    """A part of the run, samples [first_sample, end_sample), with its own weights."""

    first_sample: int
    end_sample: int
    counts: tuple[int, ...]
    """Samples of each source in a block, BLOCK_SAMPLES in all."""
    n_before: tuple[int, ...]
    """Samples of each source that earlier stages have used."""


class MixtureOrder:
    """The order in which a run reads several sources, by weights that may change between stages.

    Samples come in blocks of 1,024. In each block every source has the same number of samples, and
    a keyed permutation of the block says which. Each source has an `Order` of its own, which is
    read epoch after epoch; a source that is in several stages continues where it was. So weights
    are a setting of a run and not of the prepared text.

    Example: weights 3 and 1 give 768 and 256 samples a block, as slots 0 to 767 and 768 to 1023.
    Sample 2000 is position 976 of block 1. If the permutation of block 1 maps 976 to slot 801, the
    sample is of the second source, in slot 801 - 768 = 33, and is that source's sample number
    1 x 256 + 33 = 289: `window_starts` looks it up in the order of the source. The inverse divides:
    289 = 1 x 256 + 33 gives block 1 and slot 768 + 33 = 801, the inverse permutation gives position
    976, and the sample is 1 x 1024 + 976 = 2000.
    """

    def __init__(
        self,
        spans: Sequence[SourceSpan],
        *,
        stages: Sequence[tuple[int, Sequence[float]]],
        context_length: int,
        seed: int,
    ) -> None:
        """`stages` are their first samples, of which the first is 0, with a weight for each span.

        Raises ValueError for a weight too small to be in every block; `orders` raises it for a
        source that is shorter than a window.
        """
        self.spans = tuple(spans)
        self.context_length = context_length
        self.seed = seed
        self.stages: list[MixtureStage] = []
        end_samples = [first for first, _ in stages[1:]]
        end_samples.append(_NEVER)
        n_before = [0] * len(self.spans)
        for (first, weights), end in zip(stages, end_samples, strict=True):
            # Divide a block among the sources in whole samples, by largest remainder.
            total = sum(weights)
            exact = [BLOCK_SAMPLES * weight / total for weight in weights]
            counts = [int(share) for share in exact]
            by_remainder = sorted(range(len(exact)), key=lambda n: (counts[n] - exact[n], n))
            for number in by_remainder[: BLOCK_SAMPLES - sum(counts)]:
                counts[number] += 1
            for weight, count, span in zip(weights, counts, self.spans, strict=True):
                if weight > 0 and count == 0:
                    raise ValueError(
                        f"data.source: {span.source!r} would be {100 * weight / total:.3g} % of "
                        f"its stage; it must be at least 1 sample in {BLOCK_SAMPLES}"
                    )
            self.stages.append(MixtureStage(first, end, tuple(counts), tuple(n_before)))
            # The rest of a stage's last block is dropped, so that the next stage can begin.
            n_blocks = ceil_div(end - first, BLOCK_SAMPLES)
            n_before = [n + n_blocks * count for n, count in zip(n_before, counts, strict=True)]

    @cached_property
    def orders(self) -> list[Order]:
        """The order of each source; positions count from the start of its span."""
        return [
            Order(span.n_tokens, self.context_length, self.seed, f"source {number}")
            for number, span in enumerate(self.spans)
        ]

    def window_starts(self, samples: Indices) -> Indices:
        """Position in the text of the first id of each sample's window."""
        sources, indices = self.locate(samples)
        starts = np.empty_like(samples)
        for number, (span, order) in enumerate(zip(self.spans, self.orders, strict=True)):
            rows = sources == number
            starts[rows] = span.start + order.window_starts(indices[rows])
        return starts

    def locate(self, samples: Indices) -> tuple[Indices, Indices]:
        """The source of each sample, and its number among the samples of that source."""
        sources = np.empty_like(samples)
        indices = np.empty_like(samples)
        first_samples = np.array([stage.first_sample for stage in self.stages])
        stages = np.searchsorted(first_samples, samples, side="right") - 1
        blocks = (samples - first_samples[stages]) // BLOCK_SAMPLES
        for number, block in sorted(set(zip(stages.tolist(), blocks.tolist(), strict=True))):
            stage = self.stages[number]
            rows = (stages == number) & (blocks == block)
            positions = samples[rows] - stage.first_sample - block * BLOCK_SAMPLES
            slots = self._permutation(number, block).forward(positions)
            counts = np.array(stage.counts)
            ends = np.cumsum(counts)
            source = np.searchsorted(ends, slots, side="right")
            slots_in_source = slots - (ends - counts)[source]
            sources[rows] = source
            indices[rows] = (
                np.array(stage.n_before)[source] + block * counts[source] + slots_in_source
            )
        return sources, indices

    def windows_containing(self, begin: int, end: int, n_samples: int) -> Iterator[tuple[int, int]]:
        """Yield sample and first position of each window with any of the ids [begin, end) of one
        document, among the first `n_samples` samples."""
        number = next(n for n, s in enumerate(self.spans) if s.start < begin < s.start + s.n_tokens)
        span = self.spans[number]
        end = min(end, span.start + span.n_tokens)
        most = max(stage.n_before[number] for stage in self.stages) + n_samples
        windows = self.orders[number].windows_containing(begin - span.start, end - span.start, most)
        for index, start in windows:
            sample = self._sample_of(number, index)
            if sample is not None and sample < n_samples:
                yield sample, span.start + start

    def _sample_of(self, source: int, index: int) -> int | None:
        """Invert `locate`: the sample that is number `index` of a source; None if it was dropped at
        the end of a stage."""
        for number, stage in enumerate(self.stages):
            count = stage.counts[source]
            if count == 0 or index < stage.n_before[source]:
                continue
            block, slot_in_source = divmod(index - stage.n_before[source], count)
            block_start = stage.first_sample + block * BLOCK_SAMPLES
            if block_start >= stage.end_sample:
                continue  # it belongs to a later stage
            slot = sum(stage.counts[:source]) + slot_in_source
            position = self._permutation(number, block).inverse(np.array([slot], dtype=np.int64))
            sample = block_start + int(position[0])
            return sample if sample < stage.end_sample else None
        return None

    def _permutation(self, stage: int, block: int) -> FeistelPermutation:
        return FeistelPermutation(BLOCK_SAMPLES, self.seed, f"mixture/{stage}/{block}")

    def sources(self, n_samples: int) -> dict[str, dict[str, float]]:
        """Tokens (targets), share and epochs of each source in the first `n_samples` samples."""
        counts = np.zeros(len(self.spans), np.int64)
        for stage in self.stages:
            end = min(n_samples, stage.end_sample)
            n_blocks, n_rest = divmod(max(0, end - stage.first_sample), BLOCK_SAMPLES)
            counts += n_blocks * np.array(stage.counts)
            rest = np.arange(end - n_rest, end, dtype=np.int64)
            counts += np.bincount(self.locate(rest)[0], minlength=len(counts))
        return {
            span.source: {
                "tokens": count * self.context_length,
                "share": count / max(1, n_samples),
                "epochs": count / order.n_windows,
            }
            for span, order, count in zip(self.spans, self.orders, counts.tolist(), strict=True)
        }


@dataclass(frozen=True, slots=True)
class Rollback:
    """A return of a run to step `step`, after which the next `batches` batches of data are skipped.

    Steps count updates made, so `step` is also the index (from 0) of the next update.
    """

    step: int
    batches: int


def batch_of_step(step: int, rollbacks: Sequence[Rollback]) -> int:
    """The batch of the data (from 0) that update number `step` (from 0) reads: the same number,
    plus the batches that rollbacks before it skipped."""
    return step + sum(rollback.batches for rollback in rollbacks if rollback.step <= step)


def step_of_batch(batch: int, rollbacks: Sequence[Rollback]) -> int | None:
    """Invert `batch_of_step`; None if a rollback skipped the batch."""
    in_order = sorted(rollbacks, key=lambda rollback: rollback.step)
    for n_skipped in accumulate((rollback.batches for rollback in in_order), initial=0):
        step = batch - n_skipped
        if step >= 0 and batch_of_step(step, rollbacks) == batch:
            return step
    return None


# Which documents a step read, and which steps read a document


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A part of one document in one window: some of its ids were inputs or targets of a step."""

    step: int
    """The training step, from 1."""
    sample: int
    """The number of the window in the order of the data, from 0."""
    document: int
    """The number of the document in the stream, from 0."""
    first_token: int
    """The part is ids [first_token, stop_token) of the document, whose last id is its closing
    end-of-text token."""
    stop_token: int


@dataclass(frozen=True, slots=True)
class Tracer:
    """Which documents a step of a run read, and which steps read a document, in the past and in
    the future: by arithmetic, not a log."""

    order: Order | MixtureOrder
    document_offsets: NDArray[np.int64]
    """Of the stream, shape (n_documents + 1,)."""
    batch_size: int
    """Samples of a batch."""
    rollbacks: Sequence[Rollback] = ()

    def occurrences_in(self, step: int) -> list[Occurrence]:
        """What a step (from 1) reads, in the order of its samples and of the text."""
        batch = batch_of_step(step - 1, self.rollbacks)
        samples = batch * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        starts = self.order.window_starts(samples)
        occurrences = []
        for sample, start in zip(samples.tolist(), starts.tolist(), strict=True):
            stop = start + self.order.context_length + 1
            # Before the first document there is an end-of-text token that belongs to none.
            first = max(0, int(np.searchsorted(self.document_offsets, start, side="right")) - 1)
            end = int(np.searchsorted(self.document_offsets[:-1], stop))
            for document in range(first, end):
                occurrences.append(self._occurrence(step, sample, document, start))
        return occurrences

    def occurrences_of(self, document: int, *, n_steps: int) -> Iterator[Occurrence]:
        """Where steps 1 to `n_steps` read a document, in the order of epochs and of the text."""
        if n_steps < 1:
            return
        begin, end = self.document_offsets[document : document + 2].tolist()
        n_batches = batch_of_step(n_steps - 1, self.rollbacks) + 1
        windows = self.order.windows_containing(begin, end, n_batches * self.batch_size)
        for sample, start in windows:
            index = step_of_batch(sample // self.batch_size, self.rollbacks)
            if index is not None:
                yield self._occurrence(index + 1, sample, document, start)

    def _occurrence(self, step: int, sample: int, document: int, start: int) -> Occurrence:
        begin, end = self.document_offsets[document : document + 2].tolist()
        first = max(start, begin) - begin
        stop = min(start + self.order.context_length + 1, end) - begin
        return Occurrence(step, sample, document, first, stop)
