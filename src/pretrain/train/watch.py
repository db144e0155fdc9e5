"""Losses that are not finite, and losses that jump: seen before the update is made.

A `Watch` takes in the loss of each step and says what is wrong with one, before it can move the
weights. It is a pure function of the run's records, as is the list of rollbacks, so a resume judges
as the uninterrupted run did.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.data.order import Rollback

# Steps that a loss is compared with, and how many there must be. "2 OLMo 2 Furious" (OLMo et al.,
# 2025) skips updates beyond 6 standard deviations of the last 128 losses; early in a run these fall
# so fast that nothing is ever beyond. Here deviations are those from a straight line through 64.
WINDOW_STEPS, LEAST_STEPS = 64, 32
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
    """standard deviations of the loss above where the steps before point to"""


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
        n = len(self.losses)
        if n < LEAST_STEPS:
            return 0.0
        mean, middle = math.fsum(self.losses) / n, (n - 1) / 2
        spread = n * (n * n - 1) / 12  # the sum of (i - middle)^2
        slope = math.fsum((i - middle) * x for i, x in enumerate(self.losses)) / spread
        left = (x - mean - slope * (i - middle) for i, x in enumerate(self.losses))
        deviation = math.sqrt(math.fsum(x * x for x in left) / n)
        # A curve that flattens lies above the line, so the last losses count too; and one that
        # hardly moves is no reason to call a thousandth of it a spike.
        last = math.fsum(list(self.losses)[-8:]) / 8
        expected = max(mean + slope * (n - middle), last)
        return (loss - expected) / max(deviation, 1e-3 * abs(mean), 1e-12)

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


def rollbacks_of(records: Iterable[Mapping[str, Any]]) -> list[Rollback]:
    """The rollbacks of metrics.jsonl, in order."""
    return [Rollback(r["step"], r["batches"]) for r in records if r["kind"] == "rollback"]
