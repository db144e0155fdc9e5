"""Which documents a step saw, and which steps saw a document: by arithmetic, without a log.

The order of the data is a function and has an inverse, so both questions are answered from the
prepared folder, the seed and the batch, for steps of the past and of the future alike. A step saw a
document if an id of it was an input or a target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.data.mixture import Mixture
from pretrain.data.order import Order


@dataclass(frozen=True, slots=True)
class Sight:
    """A part of one document in one window."""

    step: int
    sample: int
    document: int
    """Number of the document in the stream, from 0."""
    first_token: int
    """The part is ids [first_token, stop_token) of the document; its closing end-of-text is the
    last id."""
    stop_token: int


@dataclass(frozen=True, slots=True)
class Tracer:
    """The windows of a run: `offsets` are those of the stream's documents, a batch is `batch_rows`
    samples."""

    order: Order | Mixture
    offsets: NDArray[np.int64]
    batch_rows: int

    def documents_of(self, step: int) -> list[Sight]:
        """What a step saw, in the order of its samples and of the text."""
        first = step * self.batch_rows
        samples = np.arange(first, first + self.batch_rows, dtype=np.int64)
        sights = []
        for sample, start in zip(samples.tolist(), self.order.starts(samples), strict=True):
            stop = start + self.order.context_length + 1
            # Before the first document stands an end-of-text token that belongs to none.
            number = max(0, int(np.searchsorted(self.offsets, start, side="right")) - 1)
            while number < len(self.offsets) - 1 and self.offsets[number] < stop:
                sights.append(self._sight(sample, number, int(start), int(stop)))
                number += 1
        return sights

    def steps_of(self, document: int, *, steps: int) -> Iterator[Sight]:
        """Where the first `steps` updates saw a document, in the order of epochs and of the
        text."""
        begin, end = int(self.offsets[document]), int(self.offsets[document + 1])
        for sample, start in self.order.windows_of(begin, end, steps * self.batch_rows):
            yield self._sight(sample, document, start, start + self.order.context_length + 1)

    def _sight(self, sample: int, document: int, start: int, stop: int) -> Sight:
        begin, end = int(self.offsets[document]), int(self.offsets[document + 1])
        return Sight(
            step=sample // self.batch_rows,
            sample=sample,
            document=document,
            first_token=max(start, begin) - begin,
            stop_token=min(stop, end) - begin,
        )
