"""Gradients -> updates: AdamW, Muon and Adagrad, a rule for each group of parameters (`grouped`),
and the learning rate as a function of the step (`schedule`; `continuation` makes one go on).

Parameters come in by name and the state goes out by name, so a checkpoint never depends on an order
of tensors.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.optimizer.config import OptimizerConfig, ScheduleConfig
    from pretrain.optimizer.grouped import build_optimizer, clip_gradients
    from pretrain.optimizer.schedule import rate_at, schedule_at

_NAMES = {
    "config": "OptimizerConfig ScheduleConfig",
    "grouped": "build_optimizer clip_gradients",
    "schedule": "rate_at schedule_at",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = [
    "OptimizerConfig",
    "ScheduleConfig",
    "build_optimizer",
    "clip_gradients",
    "rate_at",
    "schedule_at",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
