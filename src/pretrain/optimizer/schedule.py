"""The learning rate as a pure function of the step: nothing is counted, so nothing can drift on a
resume."""

from __future__ import annotations

import math

from pretrain.optimizer.config import ScheduleConfig


def schedule_at(step: int, *, config: ScheduleConfig, steps: int) -> float:
    """The share of the peak rate with which update `step` (from 0) of `steps` is made, in [0, 1].

    Cosine: "SGDR" (Loshchilov and Hutter, 2017); wsd: "MiniCPM" (Hu et al., 2024); inverse_sqrt:
    "Attention Is All You Need" (Vaswani et al., 2017), scaled so that its peak, at the end of the
    warm-up, is 1.
    """
    warmup = config.warmup_steps
    assert warmup is not None, "warmup_steps is decided before the first step"
    if step < warmup:
        return (step + 1) / (warmup + 1)
    floor = config.final_fraction
    # 0 at the end of the warm-up, 1 where an update after the last one would be.
    progress = (step - warmup) / max(1, steps - warmup)
    match config.name:
        case "constant":
            return 1.0
        case "inverse_sqrt":
            return math.sqrt((warmup + 1) / (step + 1))
        case "linear":
            return floor + (1 - floor) * (1 - progress)
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            decay_steps = max(1.0, config.decay_fraction * steps)
            return floor + (1 - floor) * min(1.0, (steps - step) / decay_steps)
