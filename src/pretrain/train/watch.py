"""Losses that are not finite, and losses that jump: seen before the update is made.

A `Watch` takes in the loss of each step and says what is wrong with one, before it can move the
weights. It is a pure function of the run's records, as is the list of rollbacks, so a resume judges
as the uninterrupted run did.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Steps that a loss is compared with, and how many there must be: as in "2 OLMo 2 Furious"
# (OLMo et al., 2025), which skips updates beyond 6 standard deviations of the last 128.
WINDOW_STEPS, LEAST_STEPS = 128, 32
# So many in a row are no spike: the loss has a new level, or the run has diverged.
MOST_IN_A_ROW = 10
MOST_ROLLBACKS = 3
NOT_FINITE, SPIKE = "not finite", "spike"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a step."""

    kind: str
    """NOT_FINITE or SPIKE"""
    z_score: float
    """standard deviations of the loss above the mean of the steps before"""


@dataclass(slots=True)
class Watch:
    """The last losses, and how many steps in a row were found wrong."""

    threshold: float
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))
    in_a_row: int = 0

    def judge(self, loss: float, grad_norm: float) -> Finding | None:
        """What is wrong with a step of this loss (nats per target), if anything; changes
        nothing."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Finding(NOT_FINITE, math.nan)
        z = self._z_score(loss)
        return Finding(SPIKE, z) if z > self.threshold and self.in_a_row < MOST_IN_A_ROW else None

    def note(self, loss: float, finding: Finding | None) -> None:
        """Take in a step that was judged."""
        if finding is not None:
            self.in_a_row += 1
            return
        if self.in_a_row >= MOST_IN_A_ROW:
            self.losses.clear()  # the level that steps were compared with has gone
        self.in_a_row = 0
        self.losses.append(loss)

    def _z_score(self, loss: float) -> float:
        if len(self.losses) < LEAST_STEPS:
            return 0.0
        mean = math.fsum(self.losses) / len(self.losses)
        variance = math.fsum((x - mean) ** 2 for x in self.losses) / len(self.losses)
        # A loss that hardly moves is no reason to call a thousandth of it a spike.
        return (loss - mean) / max(math.sqrt(variance), 1e-3 * abs(mean), 1e-12)

    @staticmethod
    def of(records: Iterable[Mapping[str, Any]], *, threshold: float) -> Watch:
        """The watch after the steps of metrics.jsonl."""
        watch = Watch(threshold)
        for record in records:
            if record["kind"] == "train":
                found = record.get("finding")
                watch.note(
                    math.nan if record["loss"] is None else record["loss"],
                    None if found is None else Finding(found, record.get("z_score") or math.nan),
                )
        return watch


@dataclass(frozen=True, slots=True)
class Rollback:
    """The run went back to `step` and passed over the data of `batches` steps from there on."""

    step: int
    batches: int


def rollbacks_of(records: Iterable[Mapping[str, Any]]) -> list[Rollback]:
    """The rollbacks of metrics.jsonl, in order."""
    return [Rollback(r["step"], r["batches"]) for r in records if r["kind"] == "rollback"]


def position_of(step: int, rollbacks: Sequence[Rollback]) -> int:
    """The batch, counted from the start of the data, that a step reads: the step itself, unless
    data was passed over before it."""
    return step + sum(back.batches for back in rollbacks if back.step <= step)
