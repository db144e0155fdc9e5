"""The batch of a step as micro-batches: rows counted off from the run's first sample."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pretrain.data import MicroBatch, Order, TokenStream, micro_batch_at
from pretrain.data.batches import IGNORE_INDEX
from pretrain.data.order import MixtureOrder, Rollback, batch_of_step


@dataclass(slots=True)
class TrainingBatches:
    """Step s takes samples [s R, (s + 1) R), R rows a batch, whatever the micro-batch and however
    many processes share them; after a rollback later ones."""

    stream: TokenStream
    context_length: int
    seed: int
    order: Order | MixtureOrder
    batch_size: int
    micro_batch_rows: int
    byte_lengths_V: Tensor
    own_rows: range
    """those rows of each batch that this process reads; the last may be beyond it, and weigh
    nothing"""
    rollbacks: list[Rollback] = field(default_factory=list)
    n_bytes: int = 0
    """bytes of text behind the targets of the step that was handed out last, of this process"""
    checksum: int = 0
    """the sum of the CRC-32 of each window of that step, of this process"""

    def position(self, step: int) -> int:
        """The batch that a step reads, counted from the start of the data."""
        return batch_of_step(step, self.rollbacks)

    def source_tokens(self, steps: int, *, epochs: bool = False) -> dict[str, Any]:
        """For the records: what the first steps read of each source, where there are several."""
        if isinstance(self.order, Order):
            return {}
        tokens = self.order.tokens(steps * self.batch_size)
        if not epochs:
            return {"sources": tokens}
        read = self.order.epochs(steps * self.batch_size)
        whole = max(1, sum(tokens.values()))
        return {
            "sources": {
                name: {"tokens": count, "share": count / whole, "epochs": read[name]}
                for name, count in tokens.items()
            }
        }

    def at(self, step: int) -> Iterator[MicroBatch]:
        self.n_bytes = self.checksum = 0
        start = self.position(step) * self.batch_size
        first, stop = start + self.own_rows.start, start + self.own_rows.stop
        end = min(stop, start + self.batch_size)
        rows = max(1, min(self.micro_batch_rows, stop - first))
        for sample in range(first, stop, rows):
            batch = micro_batch_at(
                self.stream,
                context_length=self.context_length,
                seed=self.seed,
                sample=sample,
                rows=rows,
                order=self.order,
            )
            n = max(0, min(end - sample, rows))
            self.n_bytes += int(self.byte_lengths_V[batch.targets[:n]].sum())
            windows = torch.cat([batch.inputs[:n], batch.targets[:n, -1:]], dim=1)
            self.checksum += sum(zlib.crc32(window.data) for window in windows.numpy())
            # Rows beyond the batch weigh nothing: all micro-batches have one shape, as a compiler
            # wants it, whether or not they divide the batch.
            batch.targets[n:] = IGNORE_INDEX
            yield batch
