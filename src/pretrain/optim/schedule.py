"""The learning rate as a pure function of the step, so a resumed run cannot drift from it.

A run whose schedule was changed, by `extend` or `anneal`, keeps its earlier schedules as data
(`ScheduleConfig.history`), so that the rate of an old step is exactly that of its update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, assert_never

from pretrain.optim.config import ScheduleConfig, ScheduleSegment


def lr_fraction(step: int, shape: ScheduleConfig | ScheduleSegment, steps: int) -> float:
    """Return the learning rate of update `step` (from 0) of `steps` as a fraction of the peak.

    It is in [0, 1], or above 1 while a run descends from a rate above a new, lower peak. Cosine:
    "SGDR" (Loshchilov and Hutter, 2017); wsd: "MiniCPM" (Hu et al., 2024); inverse_sqrt: "Attention
    Is All You Need" (Vaswani et al., 2017), scaled to a peak of 1 at the end of the warm-up;
    annealing to zero: MiniCPM and "2 OLMo 2 Furious" (OLMo team, 2025).
    """
    step -= shape.origin_step
    steps -= shape.origin_step
    start, floor = shape.start_fraction, shape.final_fraction
    if shape.anneal:
        return floor + (start - floor) * (1 - step / max(1, steps))

    warmup = shape.warmup_steps
    assert warmup is not None, "warmup_steps is resolved before the first step"
    if step < warmup:
        return start + (1 - start) * ((step + 1) / (warmup + 1))
    # 0 at the end of the warm-up, 1 at the update after the last one.
    progress = (step - warmup) / max(1, steps - warmup)
    match shape.name:
        case "constant":
            return 1.0
        case "inverse_sqrt":
            return math.sqrt((warmup + 1) / (step + 1))
        case "linear":
            return floor + (1 - floor) * (1 - progress)
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            return floor + (1 - floor) * min(1.0, (steps - step) / _decay_steps(shape, steps))
        case _:
            assert_never(shape.name)


def _decay_steps(shape: ScheduleConfig | ScheduleSegment, steps: int) -> float:
    """The steps in which wsd falls: from the end of the warm-up at the earliest."""
    return max(1.0, min(shape.decay_fraction * steps, steps - (shape.warmup_steps or 0)))


@dataclass(frozen=True, slots=True)
class LRSchedule:
    """All learning rates of a run: its schedule, its peak and its number of steps."""

    schedule: ScheduleConfig
    learning_rate: float
    steps: int

    def at(self, step: int) -> float:
        """Return the learning rate of update `step` (from 0); a step of an earlier schedule has
        that schedule's peak."""
        for segment in self.schedule.history:
            if step < segment.until_step:
                return segment.learning_rate * lr_fraction(step, segment, segment.steps)
        return self.learning_rate * lr_fraction(step, self.schedule, self.steps)

    @property
    def segments(self) -> tuple[ScheduleSegment, ...]:
        """The schedules of all steps, oldest first."""
        names = {f.name for f in fields(ScheduleSegment)} & {f.name for f in fields(ScheduleConfig)}
        last = ScheduleSegment(
            until_step=self.steps,
            steps=self.steps,
            learning_rate=self.learning_rate,
            **{name: getattr(self.schedule, name) for name in names},
        )
        return (*self.schedule.history, last)

    @property
    def fall_start(self) -> float:
        """The step at which wsd begins to fall."""
        return self.steps - _decay_steps(self.schedule, self.steps)

    def falls_at(self, step: int) -> bool:
        """Whether update `step` has a lower learning rate than the one before it."""
        return self.at(step) < self.at(step - 1)

    def decided(self, decisions: Iterable[Mapping[str, Any]]) -> LRSchedule:
        """Return this schedule with what the clock has decided (`train.clock`): before update
        `step` that the run has `steps` in all, and that the rate `falls` linearly from where it
        is, or stays at the peak for its part of the new number of steps."""
        schedule, is_extended = self, self.schedule.origin_step > 0  # then its history has them
        changed_at = max((segment.until_step for segment in self.schedule.history), default=0)
        for decision in () if is_extended else decisions:
            step, steps = max(decision["step"], changed_at), decision["steps"]
            if not decision["falls"]:
                schedule = replace(schedule, steps=steps)
            elif steps != schedule.steps or not schedule.falls_at(step):
                # It begins a step earlier than an annealing: decided again, it must fall further.
                fall = schedule.changed(step, steps, peak=self.learning_rate, anneal=True)
                schedule = replace(fall, schedule=replace(fall.schedule, origin_step=step - 1))
        return schedule

    def history_until(self, step: int) -> tuple[ScheduleSegment, ...]:
        """Return the schedules of the steps before `step`, for a schedule that changes there."""
        if step == 0:
            return ()
        segments = self.segments
        ended = [segment for segment in segments[:-1] if segment.until_step < step]
        return (*ended, replace(segments[len(ended)], until_step=step))

    def changed(self, start_step: int, steps: int, *, peak: float, **shape: Any) -> LRSchedule:
        """Return this schedule with another shape and peak from `start_step` on. The new shape
        begins at the learning rate of the step before."""
        schedule = replace(
            self.schedule,
            **shape,
            origin_step=start_step,
            start_fraction=self.at(start_step - 1) / peak,
            history=self.history_until(start_step),
        )
        return LRSchedule(schedule, peak, steps)


def extend(
    old: LRSchedule, *, start_step: int, steps: int, overrides: Mapping[str, Any]
) -> LRSchedule:
    """Continue a run of `start_step` steps to `steps`.

    The rate rises from that of the last step to the peak over warmup_steps, and then has the run's
    own shape over the added steps. `overrides` may have a learning_rate and fields of the schedule
    for the added steps. Raises ValueError if the warm-up does not end within the added steps.
    """
    own_shape = next(segment for segment in reversed(old.segments) if not segment.anneal)
    names = ("name", "warmup_steps", "decay_fraction", "final_fraction")
    shape = {name: overrides.get(name, getattr(own_shape, name)) for name in names}
    peak = overrides.get("learning_rate", own_shape.learning_rate)
    new = old.changed(start_step, steps, peak=peak, anneal=False, **shape)

    added, warmup = steps - start_step, shape["warmup_steps"]
    stays_at_peak = new.schedule.start_fraction == 1.0 and shape["name"] == "constant"
    if warmup >= added and not stays_at_peak:
        raise ValueError(
            f"{added} added steps are too few for schedule.warmup_steps {warmup}: the learning "
            f"rate would not reach its peak; train.steps must be at least "
            f"{start_step + warmup + 1}, or --schedule.warmup_steps smaller"
        )
    return new


def anneal(
    old: LRSchedule, *, start_step: int, steps: int, final_fraction: float = 0.0
) -> LRSchedule:
    """Continue a run of `start_step` steps to `steps` with a linear decay of the learning rate,
    from that of the last step to `final_fraction` of the peak.

    Raises ValueError if the rate has reached 0 already, or is not above `final_fraction`.
    """
    if old.at(start_step) == 0.0:
        shape = "annealing" if old.schedule.anneal else old.schedule.name
        raise ValueError(
            f"the learning rate of this run has reached 0 already ({shape}, final_fraction 0), so "
            "it cannot be annealed; an annealing starts from a run that ended above 0 (constant, "
            "inverse_sqrt, or a final_fraction above 0): first run pretrain extend, for example "
            "with --schedule.name constant"
        )
    peak = old.learning_rate
    new = old.changed(start_step, steps, peak=peak, anneal=True, final_fraction=final_fraction)
    if final_fraction >= new.schedule.start_fraction:
        raise ValueError(
            f"schedule.final_fraction is {final_fraction:g}; it must be below the fraction of the "
            f"peak learning rate at which the run ended, {new.schedule.start_fraction:g}"
        )
    return new


def compare_schedules(
    old: LRSchedule, new: LRSchedule, *, start_step: int
) -> list[dict[str, float | None]]:
    """Return both learning rates at 12 steps, 8 of them from `start_step` on.

    The rate is None after the end of a schedule.
    """
    last = max(old.steps, new.steps) - 1
    before = {round(i * (start_step - 1) / 3) for i in range(4)} if start_step else set()
    after = {start_step + round(i * max(0, last - start_step) / 7) for i in range(8)}
    return [
        {
            "step": step,
            "old": old.at(step) if step < old.steps else None,
            "new": new.at(step) if step < new.steps else None,
        }
        for step in sorted(before | after)
    ]


def schedule_table(rows: list[dict[str, float | None]]) -> str:
    """Format the rows of `compare_schedules`, with a bar for the new learning rate."""
    highest = max(row["new"] or 0.0 for row in rows) or 1.0
    lines = [f"  {'step':>8}  {'old lr':>9}  {'new lr':>9}"]
    for row in rows:
        old, new = ("-" if lr is None else f"{lr:.3g}" for lr in (row["old"], row["new"]))
        bar = "#" * round(32 * (row["new"] or 0.0) / highest)
        lines.append(f"  {row['step']:>8,}  {old:>9}  {new:>9}  {bar}".rstrip())
    return "\n".join(lines)
