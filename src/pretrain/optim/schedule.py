"""The learning rate as a pure function of the step: nothing is counted, so nothing can drift on a
resume.

A run whose schedule was changed (`continuation`) keeps the schedules of its past as data, so that
the rate of an old step is the very number that the step was made with.
"""

from __future__ import annotations

import math

from pretrain.optim.config import ScheduleConfig, ScheduleSegment


def rate_at(step: int, *, config: ScheduleConfig, learning_rate: float, steps: int) -> float:
    """The learning rate of update `step`, whose peak was `learning_rate` or, for a step of the
    past, what it was then."""
    part = _past_at(step, config)
    peak = learning_rate if part is None else part.learning_rate
    return peak * schedule_at(step, config=config, steps=steps)


def schedule_at(step: int, *, config: ScheduleConfig, steps: int) -> float:
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
