"""Batches -> better weights.

`steps` is the heart, a generator of updates; `loop` the whole run around it in time's order;
`decide` fills what a config left open, `windows` checks what needs no tensor; `records` are the
run's files, `fingerprint` what a resume must find unchanged, `changes` what was accepted instead,
`screen` and `overview` what a person sees, `signals` how it is stopped.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.train.config import TrainConfig
    from pretrain.train.loop import train
    from pretrain.train.steps import StepReport, train_step, training_steps

_NAMES = {
    "config": "TrainConfig",
    "loop": "train",
    "steps": "StepReport train_step training_steps",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = ["StepReport", "TrainConfig", "train", "train_step", "training_steps"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
