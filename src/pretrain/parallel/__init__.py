"""One model -> many devices, from outside: `parallelize` (`layout`) lays an objective over the
processes of a mesh, and what it returns (`model`) is asked for gradients and norms.

`shards` has what each process holds, `rows` the sum of sparse gradients, `muon` the one rule of an
optimizer that needs whole matrices. The model does not know of any of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.parallel.config import ParallelConfig
    from pretrain.parallel.layout import parallelize
    from pretrain.parallel.model import Parallel

_NAMES = {"config": "ParallelConfig", "layout": "parallelize", "model": "Parallel"}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = ["Parallel", "ParallelConfig", "parallelize"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
