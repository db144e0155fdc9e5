"""The batch of a step as micro-batches: rows counted off from the run's first sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pretrain.data import MicroBatch, Order, TokenStream, micro_batch_at
from pretrain.data.mixture import Mixture


@dataclass(slots=True)
class TrainingBatches:
    """Step s takes samples [s R, (s + 1) R), R rows a batch, whatever the micro-batch."""

    stream: TokenStream
    context_length: int
    seed: int
    order: Order | Mixture
    batch_rows: int
    micro_batch_rows: int
    byte_lengths_V: Tensor
    n_bytes: int = 0
    """bytes of text behind the targets of the step that was handed out last"""

    def source_tokens(self, steps: int, *, epochs: bool = False) -> dict[str, Any]:
        """For the records: what the first steps read of each source, where there are several."""
        if isinstance(self.order, Order):
            return {}
        tokens = self.order.tokens(steps * self.batch_rows)
        if not epochs:
            return {"sources": tokens}
        read = self.order.epochs(steps * self.batch_rows)
        whole = max(1, sum(tokens.values()))
        return {
            "sources": {
                name: {"tokens": count, "share": count / whole, "epochs": read[name]}
                for name, count in tokens.items()
            }
        }

    def at(self, step: int) -> Iterator[MicroBatch]:
        self.n_bytes = 0
        first = step * self.batch_rows
        for sample in range(first, first + self.batch_rows, self.micro_batch_rows):
            batch = micro_batch_at(
                self.stream,
                context_length=self.context_length,
                seed=self.seed,
                sample=sample,
                rows=self.micro_batch_rows,
                order=self.order,
            )
            self.n_bytes += int(self.byte_lengths_V[batch.targets].sum())
            yield batch
