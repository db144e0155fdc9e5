"""Which process keeps the others waiting: one whose forward passes take far longer than theirs.

A forward pass waits for nobody where each process has all weights; where weights are gathered on
the way, and on a GPU, whose host runs ahead, it tells less.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

# Steps that are looked at together, and the share of the median speed below which one is named.
WINDOW, SLOW = 20, 0.7


@dataclass(slots=True)
class Stragglers:
    _sums: list[float] = field(default_factory=list)
    _steps: int = 0
    _named: set[int] = field(default_factory=set)

    def note(self, seconds: Sequence[float]) -> list[str]:
        """Take in a step's forward seconds, by rank; returns a sentence for each process that has
        become slow, or has recovered."""
        self._sums = [
            a + b for a, b in zip(self._sums or [0.0] * len(seconds), seconds, strict=True)
        ]
        self._steps += 1
        if self._steps < WINDOW or len(seconds) == 1:
            return []
        middle = statistics.median_low(self._sums)
        # Processes of a pipeline do different work, and do not say how long it takes.
        speeds = [middle / each if each else 1.0 for each in self._sums]
        slow = {rank for rank, speed in enumerate(speeds) if speed < SLOW}
        said = [
            f"process {rank} is slow: in {WINDOW} steps its forward passes went at "
            f"{speeds[rank]:.0%} of the others' speed, and all wait for it"
            for rank in sorted(slow - self._named)
        ]
        said += [
            f"process {rank} is as fast as the others again" for rank in sorted(self._named - slow)
        ]
        self._sums, self._steps, self._named = [], 0, slow
        return said
