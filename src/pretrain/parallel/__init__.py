"""Parallelism from outside: `parallelize` distributes a loss module over processes.

`model` has `parallelize`, which applies the modes in one order, and `ParallelModel`, which computes
gradients. Each mode has a module: `replicated` (data), `sharded` (FSDP), `tensor`, `context`,
`pipeline`, `deterministic` and `activation_checkpointing`. The model knows none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.parallel.config import ParallelConfig
    from pretrain.parallel.model import ParallelModel, parallelize

__getattr__ = lazily(
    __name__,
    config="ParallelConfig",
    model="ParallelModel parallelize",
)
__all__ = ["ParallelConfig", "ParallelModel", "parallelize"]
