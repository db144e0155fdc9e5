"""A schedule that goes on where it had ended, or is changed on the way.

Schedules come in, and out goes one whose past is as it was, with a table of both for people.
Refused are an annealing from a rate of 0, and a warm-up that does not fit into the added steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pretrain.optim.config import ScheduleConfig, ScheduleSegment
from pretrain.optim.schedule import rate_at


@dataclass(frozen=True, slots=True)
class Curve:
    """All rates of a run: its schedule, its peak rate, its number of steps."""

    schedule: ScheduleConfig
    learning_rate: float
    steps: int

    def at(self, step: int) -> float:
        return rate_at(
            step, config=self.schedule, learning_rate=self.learning_rate, steps=self.steps
        )

    def history_until(self, step: int) -> tuple[ScheduleSegment, ...]:
        """The schedules of the steps before `step`, for a curve that is another one from there."""
        if step == 0:
            return ()
        parts = (*self.schedule.history, self._as_past())
        ended = [part for part in parts[:-1] if part.until_step < step]
        return (*ended, replace(parts[len(ended)], until_step=step))

    def own_shape(self) -> ScheduleSegment:
        """The newest part that was no annealing: what the run itself is like."""
        parts = (*self.schedule.history, self._as_past())
        return next(part for part in reversed(parts) if not part.anneal)

    def _as_past(self) -> ScheduleSegment:
        schedule, warmup = self.schedule, self.schedule.warmup_steps
        assert warmup is not None, "warmup_steps is decided before the first step"
        return ScheduleSegment(
            until_step=self.steps,
            steps=self.steps,
            learning_rate=self.learning_rate,
            name=schedule.name,
            warmup_steps=warmup,
            decay_fraction=schedule.decay_fraction,
            final_fraction=schedule.final_fraction,
            origin_step=schedule.origin_step,
            start_fraction=schedule.start_fraction,
            anneal=schedule.anneal,
        )


def extend(curve: Curve, *, done: int, steps: int, given: Mapping[str, Any]) -> Curve:
    """Go on from `done` to `steps`: up from the rate of the last step to the peak over
    warmup_steps, then the run's own shape over the added steps.

    `given` may hold a learning_rate and fields of the schedule for what is added.
    """
    own, rate = curve.own_shape(), curve.at(done - 1)
    fields = {
        name: given.get(name, getattr(own, name))
        for name in ("name", "warmup_steps", "decay_fraction", "final_fraction")
    }
    peak = given.get("learning_rate", own.learning_rate)
    start = rate / peak
    added, warmup = steps - done, fields["warmup_steps"]
    stays = start == 1.0 and fields["name"] == "constant"
    if warmup >= added and not stays:
        raise ValueError(
            f"{added} added steps are too few for schedule.warmup_steps {warmup}: the rate would "
            f"not reach its peak; take train.steps {done + warmup + 1} or more, or a shorter "
            "--schedule.warmup_steps"
        )
    schedule = replace(
        curve.schedule,
        **fields,
        origin_step=done,
        start_fraction=start,
        anneal=False,
        history=curve.history_until(done),
    )
    return Curve(schedule, peak, steps)


def anneal(curve: Curve, *, done: int, steps: int, final_fraction: float = 0.0) -> Curve:
    """Go on from `done` to `steps` in a straight line from the rate of the last step down to
    `final_fraction` of the peak."""
    start = curve.at(done - 1) / curve.learning_rate
    if curve.at(done) == 0.0:
        shape = "annealing" if curve.schedule.anneal else curve.schedule.name
        raise ValueError(
            f"the rate of this run has fallen to 0 already ({shape}, final_fraction 0), so there "
            "is nothing to anneal from; annealing starts from a run that ended above 0 (constant, "
            "inverse_sqrt, a final_fraction above 0): make such steps first with pretrain extend, "
            "say with --schedule.name constant"
        )
    if final_fraction >= start:
        raise ValueError(
            f"schedule.final_fraction {final_fraction:g} is not below the {start:g} of the peak "
            "rate at which the run ended; an annealing falls"
        )
    schedule = replace(
        curve.schedule,
        final_fraction=final_fraction,
        origin_step=done,
        start_fraction=start,
        anneal=True,
        history=curve.history_until(done),
    )
    return Curve(schedule, curve.learning_rate, steps)


def compare(old: Curve, new: Curve, *, done: int) -> list[dict[str, float | None]]:
    """Both rates at 12 steps, most of them from `done` on; None where a curve has ended."""
    end = max(old.steps, new.steps) - 1
    before = {round(i * (done - 1) / 3) for i in range(4)} if done else set()
    after = {done + round(i * max(0, end - done) / 7) for i in range(8)}
    return [
        {
            "step": step,
            "old": old.at(step) if step < old.steps else None,
            "new": new.at(step) if step < new.steps else None,
        }
        for step in sorted(before | after)
    ]


def table(rows: list[dict[str, float | None]]) -> str:
    """Rows of `compare` for people, the new rate as a bar beside it."""
    most = max(row["new"] or 0.0 for row in rows) or 1.0
    lines = [f"  {'step':>8}  {'old rate':>9}  {'new rate':>9}"]
    for row in rows:
        old, new = ("-" if rate is None else f"{rate:.3g}" for rate in (row["old"], row["new"]))
        bar = "#" * round(32 * (row["new"] or 0.0) / most)
        lines.append(f"  {row['step']:>8,}  {old:>9}  {new:>9}  {bar}".rstrip())
    return "\n".join(lines)
