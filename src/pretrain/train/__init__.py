"""Batches -> better weights.

`steps` is the heart, a generator of updates; `loop` the whole run around it in time's order;
`decide` fills what a config left open, `windows` checks what needs no tensor; `records` are the
run's files, `fingerprint` what a resume must find unchanged, `changes` what was accepted instead,
`screen` and `overview` what a person sees, `signals` how it is stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.train.config import TrainConfig
    from pretrain.train.loop import train
    from pretrain.train.steps import StepReport, train_step, training_steps

__getattr__ = lazily(
    __name__,
    config="TrainConfig",
    loop="train",
    steps="StepReport train_step training_steps",
)
__all__ = ["StepReport", "TrainConfig", "train", "train_step", "training_steps"]
