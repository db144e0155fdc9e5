"""Which documents a training step read, and which steps read a document: by arithmetic, not a log.

The order of the data is a function with an inverse, so both questions are answered from the
prepared folder, the seed, the batch size and the rollbacks, for steps of the past and of the future
alike. Steps count from 1, as in metrics.jsonl and on the console. A step read a document if one of
the document's ids was an input or a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.data.order import MixtureOrder, Order, Rollback, batch_of_step, step_of_batch


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A part of one document in one window."""

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
    """The windows of a run."""

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
                occurrences.append(self._occurrence(step, sample, document, start, stop))
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
                stop = start + self.order.context_length + 1
                yield self._occurrence(index + 1, sample, document, start, stop)

    def _occurrence(
        self, step: int, sample: int, document: int, start: int, stop: int
    ) -> Occurrence:
        begin, end = self.document_offsets[document : document + 2].tolist()
        return Occurrence(
            step=step,
            sample=sample,
            document=document,
            first_token=max(start, begin) - begin,
            stop_token=min(stop, end) - begin,
        )
