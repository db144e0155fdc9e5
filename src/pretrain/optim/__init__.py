"""Gradients -> updates.

`param_groups` builds the optimizer, in which each group of parameters has its own rule: AdamW,
`muon` or `adagrad`. `schedule` has the learning rate as a function of the step, and continues
schedules. Parameters come in by name and the state goes out by name, so a checkpoint does not
depend on an order of tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.optim.config import OptimizerConfig, ScheduleConfig
    from pretrain.optim.param_groups import build_optimizer, clip_gradients
    from pretrain.optim.schedule import lr_at

__getattr__ = lazily(
    __name__,
    config="OptimizerConfig ScheduleConfig",
    param_groups="build_optimizer clip_gradients",
    schedule="lr_at",
)
__all__ = [
    "OptimizerConfig",
    "ScheduleConfig",
    "build_optimizer",
    "clip_gradients",
    "lr_at",
]
