"""One model -> many devices, from outside: `parallelize` (`layout`) lays an objective over the
processes of a mesh, and what it returns (`model`) is asked for gradients and norms.

`shards` has what each process holds, `rows` the sum of sparse gradients, `muon` the one rule of an
optimizer that needs whole matrices. The model does not know of any of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.parallel.config import ParallelConfig
    from pretrain.parallel.layout import parallelize
    from pretrain.parallel.model import ParallelModel

__getattr__ = lazily(
    __name__,
    config="ParallelConfig",
    layout="parallelize",
    model="ParallelModel",
)
__all__ = ["ParallelConfig", "ParallelModel", "parallelize"]
