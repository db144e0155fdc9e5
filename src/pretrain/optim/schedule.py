"""The learning rate as a pure function of the step: nothing is counted, so nothing can drift on a
resume.

A run whose schedule was changed (`continuation`) keeps the schedules of its past as data, so that
the rate of an old step is the very number that the step was made with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pretrain.optim.config import ScheduleConfig, ScheduleSegment


def lr_at(step: int, *, config: ScheduleConfig, learning_rate: float, steps: int) -> float:
    """The learning rate of update `step`, whose peak was `learning_rate` or, for a step of the
    past, what it was then."""
    part = _past_at(step, config)
    peak = learning_rate if part is None else part.learning_rate
    return peak * lr_fraction_at(step, config=config, steps=steps)


def lr_fraction_at(step: int, *, config: ScheduleConfig, steps: int) -> float:
    """The share of the peak rate with which update `step` (from 0) of `steps` is made.

    In [0, 1], and above only while a run comes down from a rate above a new, lower peak. Cosine:
    "SGDR" (Loshchilov and Hutter, 2017); wsd: "MiniCPM" (Hu et al., 2024); inverse_sqrt: "Attention
    Is All You Need" (Vaswani et al., 2017), scaled so that its peak, at the end of the warm-up, is
    1; annealing to zero: MiniCPM and "2 OLMo 2 Furious" (OLMo team, 2025).
    """
    part = _past_at(step, config)
    return _share(step, config, steps) if part is None else _share(step, part, part.steps)


def _past_at(step: int, config: ScheduleConfig) -> ScheduleSegment | None:
    return next((part for part in config.history if step < part.until_step), None)


def _share(step: int, shape: ScheduleConfig | ScheduleSegment, steps: int) -> float:
    step, steps = step - shape.origin_step, steps - shape.origin_step
    start, floor = shape.start_fraction, shape.final_fraction
    if shape.anneal:
        return floor + (start - floor) * (1 - step / max(1, steps))
    warmup = shape.warmup_steps
    assert warmup is not None, "warmup_steps is decided before the first step"
    if step < warmup:
        return start + (1 - start) * ((step + 1) / (warmup + 1))
    # 0 at the end of the warm-up, 1 where an update after the last one would be.
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
            # A decay that would begin within the warm-up begins at its end.
            decay_steps = max(1.0, min(shape.decay_fraction * steps, steps - warmup))
            return floor + (1 - floor) * min(1.0, (steps - step) / decay_steps)


@dataclass(frozen=True, slots=True)
class LRSchedule:
    """All rates of a run: its schedule, its peak rate, its number of steps."""

    schedule: ScheduleConfig
    learning_rate: float
    steps: int

    def at(self, step: int) -> float:
        return lr_at(step, config=self.schedule, learning_rate=self.learning_rate, steps=self.steps)

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


def extend(curve: LRSchedule, *, done: int, steps: int, given: Mapping[str, Any]) -> LRSchedule:
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
    return LRSchedule(schedule, peak, steps)


def anneal(curve: LRSchedule, *, done: int, steps: int, final_fraction: float = 0.0) -> LRSchedule:
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
    return LRSchedule(schedule, curve.learning_rate, steps)


def compare_schedules(
    old: LRSchedule, new: LRSchedule, *, done: int
) -> list[dict[str, float | None]]:
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


def schedule_table(rows: list[dict[str, float | None]]) -> str:
    """Rows of `compare_schedules` for people, the new rate as a bar beside it."""
    most = max(row["new"] or 0.0 for row in rows) or 1.0
    lines = [f"  {'step':>8}  {'old rate':>9}  {'new rate':>9}"]
    for row in rows:
        old, new = ("-" if rate is None else f"{rate:.3g}" for rate in (row["old"], row["new"]))
        bar = "#" * round(32 * (row["new"] or 0.0) / most)
        lines.append(f"  {row['step']:>8,}  {old:>9}  {new:>9}  {bar}".rstrip())
    return "\n".join(lines)
