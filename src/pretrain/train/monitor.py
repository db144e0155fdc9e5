"""Loss spikes, values that are not finite, and slow processes.

`SpikeDetector` checks the loss of a step before its update is made; `StragglerDetector` names the
process that the others wait for. The spike detector is a pure function of metrics.jsonl, as is the
list of rollbacks, so a resumed run detects the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.data.order import Rollback

# Steps that a loss is compared with, and the fewest for a comparison. "2 OLMo 2 Furious" (OLMo et
# al., 2025) skips updates beyond 6 standard deviations of the last 128 losses. Early in a run
# losses fall so fast that none is ever beyond, so deviations here are from a straight line through
# the last 64 losses.
WINDOW_STEPS = 64
LEAST_STEPS = 32
# After this many anomalies in a row the loss has a new level, or the run has diverged.
MOST_IN_A_ROW = 10
MOST_ROLLBACKS = 3
NOT_FINITE = "not finite"
SPIKE = "spike"

# Steps over which the speed of processes is compared, and the share of the median speed below which
# a process is slow.
STRAGGLER_STEPS = 20
SLOW = 0.7


@dataclass(frozen=True, slots=True)
class Anomaly:
    """What is wrong with a step."""

    kind: str
    """NOT_FINITE or SPIKE"""
    z_score: float
    """standard deviations of the loss above the trend of the steps before"""


@dataclass(slots=True)
class SpikeDetector:
    """The last losses, and the number of anomalies in a row."""

    threshold: float
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))
    in_a_row: int = 0

    def check(self, loss: float, grad_norm: float) -> Anomaly | None:
        """The anomaly of a step with this loss (nats per target), if there is one."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Anomaly(NOT_FINITE, math.nan)
        n = len(self.losses)
        if n < LEAST_STEPS or self.in_a_row >= MOST_IN_A_ROW:
            return None
        mean = math.fsum(self.losses) / n
        middle = (n - 1) / 2
        variance_of_i = n * (n * n - 1) / 12  # the sum of (i - middle)^2
        trend = math.fsum((i - middle) * x for i, x in enumerate(self.losses)) / variance_of_i
        residuals = (x - mean - trend * (i - middle) for i, x in enumerate(self.losses))
        deviation = math.sqrt(math.fsum(x * x for x in residuals) / n)
        # A curve that flattens is above its line, so the mean of the last 8 losses is a second
        # expectation. And in a curve that hardly moves a thousandth of the loss is not a spike.
        last = math.fsum(list(self.losses)[-8:]) / 8
        expected = max(mean + trend * (n - middle), last)
        z_score = (loss - expected) / max(deviation, 1e-3 * abs(mean), 1e-12)
        return Anomaly(SPIKE, z_score) if z_score > self.threshold else None

    def record(self, loss: float, anomaly: Anomaly | None) -> None:
        """Take in a step that was checked."""
        if anomaly is not None:
            self.in_a_row += 1
            return
        if self.in_a_row >= MOST_IN_A_ROW:
            self.losses.clear()  # they are of the former level
        self.in_a_row = 0
        self.losses.append(loss)

    @staticmethod
    def from_log(records: Iterable[Mapping[str, Any]], *, threshold: float) -> SpikeDetector:
        """The detector after the steps of metrics.jsonl."""
        detector = SpikeDetector(threshold)
        for record in records:
            if record["kind"] == "train":
                kind = record.get("finding")
                anomaly = None if kind is None else Anomaly(kind, math.nan)
                detector.record(record["loss"], anomaly)
        return detector


def rollbacks_of(records: Iterable[Mapping[str, Any]]) -> list[Rollback]:
    """The rollbacks of metrics.jsonl, in order."""
    return [Rollback(r["step"], r["batches"]) for r in records if r["kind"] == "rollback"]


# --- slow processes -------------------------------------------------------------------------------


@dataclass(slots=True)
class StragglerDetector:
    """Finds processes whose forward passes take far longer than those of the others.

    A forward pass does not wait for other processes where each has all weights; where weights are
    gathered during it, and on a GPU, whose host runs ahead, the measurement is less precise.
    """

    _steps: list[Sequence[float]] = field(default_factory=list)
    _slow: set[int] = field(default_factory=set)

    def record(self, seconds: Sequence[float]) -> list[str]:
        """Take in a step's forward seconds, by rank; returns a message for each process that has
        become slow, or has recovered."""
        self._steps.append(seconds)
        if len(self._steps) < STRAGGLER_STEPS:
            return []
        totals = [sum(column) for column in zip(*self._steps, strict=True)]
        median = statistics.median_low(totals)
        # The stages of a pipeline do different work, and report no time.
        speeds = [median / each if each else 1.0 for each in totals]
        slow = {rank for rank, speed in enumerate(speeds) if speed < SLOW}
        messages = [
            f"process {rank} is slow: in {STRAGGLER_STEPS} steps its forward passes ran at "
            f"{speeds[rank]:.0%} of the others' speed, and all wait for it"
            for rank in sorted(slow - self._slow)
        ]
        messages += [
            f"process {rank} is as fast as the others again" for rank in sorted(self._slow - slow)
        ]
        self._steps = []
        self._slow = slow
        return messages
