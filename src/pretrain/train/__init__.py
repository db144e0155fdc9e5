"""Batches -> better weights.

`loop` is the whole run in the order of time, `step` one update; `state` is a run in memory and its
checkpoints; `resolve` fills the empty fields of a config, `build` makes model, optimizer and
batches of it. Around the loop: `eval_hooks` evaluates, `monitor` detects loss spikes, `console`
shows what a user sees, `signals` stops a run, `profile` measures a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.train.config import TrainConfig
    from pretrain.train.loop import train
    from pretrain.train.state import Run, open_run
    from pretrain.train.step import StepReport, train_step, training_steps

__getattr__ = lazily(
    __name__,
    config="TrainConfig",
    loop="train",
    state="Run open_run",
    step="StepReport train_step training_steps",
)
__all__ = ["Run", "StepReport", "TrainConfig", "open_run", "train", "train_step", "training_steps"]
