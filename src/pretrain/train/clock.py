"""When the learning rate of a run that has minutes begins to fall, and after which step it ends.

`resolve` plans the steps by a trial of seconds; during the run its clock decides, before a step is
made: the fall begins when the plan's share of the minutes is over, and its length is corrected when
it would end late or early. A decision is written before the step that it governs, and never made
again, so rates are a function of the config and the decisions (`LRSchedule.decided`).
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low
from typing import Any

from pretrain.optim.schedule import LRSchedule
from pretrain.train.config import TrainConfig, filled

# A fall is corrected when it would end this part of what is left, and of all minutes, off the end:
# a far end is corrected only for large errors, and the last errors are small.
OFF_LEFT, OFF_ALL = 1 / 8, 0.01
# This part of the minutes is taken for a fall from the peak even if no time is left: a model whose
# rate never fell is much worse than one that is a little late.
SHORTEST_FALL = 0.04
# Steps more or less than planned, as a part of them, that are worth a sentence.
WORTH_TELLING = 0.05


def now() -> float:
    """Seconds on a clock that runs on while the machine is suspended, where the system has one."""
    has_it = hasattr(time, "CLOCK_BOOTTIME")
    return time.clock_gettime(time.CLOCK_BOOTTIME) if has_it else time.monotonic()


@dataclass(slots=True)
class Clock:
    """The time of a run from its first step on, and what is decided by it."""

    train: TrainConfig
    plan: LRSchedule
    most_steps: int | None
    decisions: list[dict[str, Any]]
    """the lines of clock.jsonl"""
    used: float = 0.0
    """seconds until the last lap, also those of earlier processes up to their last checkpoint"""
    step_seconds: list[float] = field(default_factory=list)
    """of the latest steps"""
    other_seconds: float = 0.0
    """between steps: in evaluations and checkpoints"""
    n_evaluations: int = 0
    last_lap: float = field(default_factory=lambda: now())

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self.last_lap = self.last_lap, now()
        self.used += self.last_lap - before
        return self.last_lap - before

    def end_step(self, step: int) -> None:
        """Count step number `step` (from 1), but not one that compiles: the first."""
        seconds = self.lap()
        if self.train.compile == "on":
            self.train, self.used = replace(self.train, compile="off"), self.used - seconds
        else:
            n_latest = min(64, max(3, self.plan.steps // 16))
            self.step_seconds = [*self.step_seconds, seconds][-n_latest:]
        self.n_evaluations += step % filled(self.train.evaluate_every) == 0

    def decide(self, step: int, schedule: LRSchedule) -> dict[str, Any] | None:
        """Decide before update `step` (from 0) whether the run changes its schedule."""
        self.other_seconds += self.lap()
        last = self.decisions[-1] if self.decisions else {"step": 0, "falls": False}
        if step <= last["step"] or not self.step_seconds:
            return None
        given, peak_share = 60 * filled(self.train.minutes), self.plan.fall_start / self.plan.steps
        left, is_time = given - self.used, self.used >= peak_share * given
        if last["falls"]:
            late = self._seconds_until(schedule.steps, step) - left
            is_due = abs(late) > max(OFF_LEFT * left, OFF_ALL * given)
        else:
            is_due = is_time or schedule.falls_at(step) or step == schedule.steps - 1
        if not is_due:
            return None

        shortest = min(SHORTEST_FALL, 1 - peak_share) * given
        left = max(left, shortest * schedule.at(step - 1) / schedule.learning_rate)
        some = range(step + 1, step + 10**10)
        nearest = left + median_low(self.step_seconds) / 2
        steps = step + bisect_right(some, nearest, key=lambda n: self._seconds_until(n, step))
        steps = max(step + 1, min(steps, self.most_steps or steps))
        falls = last["falls"] or is_time or replace(schedule, steps=steps).falls_at(step)
        # Without time left, later steps may only be fewer, so that the rate does fall.
        if last["falls"] and not (steps < schedule.steps if late > 0 else steps > schedule.steps):
            return None
        return {"step": step, "steps": steps, "falls": falls, "seconds": round(self.used, 3)}

    def _seconds_until(self, steps: int, step: int) -> float:
        """Seconds from update `step` to the last of `steps`, at the present pace. It is the median,
        so that a step that waited for something once does not count."""
        every = filled(self.train.evaluate_every)
        evaluations = (steps - 1) // every - step // every
        evaluating = evaluations * self.other_seconds / max(1, self.n_evaluations)
        return (steps - step) * median_low(self.step_seconds) + evaluating


def describe(plan: LRSchedule, decisions: Sequence[dict[str, Any]]) -> str:
    """Say what the clock has changed of the plan; empty for nothing."""
    falls = [decision for decision in decisions if decision["falls"]]
    if not falls or abs(falls[-1]["steps"] - plan.steps) <= WORTH_TELLING * plan.steps:
        return ""
    begin, steps = falls[0]["step"] + 1, falls[-1]["steps"]
    return (
        f"the learning rate falls from step {begin:,} on, not {int(plan.fall_start) + 1:,}, and "
        f"the run ends after {steps:,} steps, not {plan.steps:,}: the machine is "
        f"{'slower' if steps < plan.steps else 'faster'} than measured at the start"
    )
