"""Documents -> shards -> batches.

`prepare` turns a corpus into a folder of ids, `shards` writes and reads such a folder, `order` says
which window is sample number s, `batches` makes tensors of windows. The first three are free of
torch; text ends at the shards.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.data.batches import MicroBatch, evaluation_batches, micro_batch_at
    from pretrain.data.config import DataConfig
    from pretrain.data.order import Order
    from pretrain.data.preparation import prepare
    from pretrain.data.shards import PreparedData, TokenStream, open_prepared

_NAMES = {
    "batches": "MicroBatch evaluation_batches micro_batch_at",
    "config": "DataConfig",
    "order": "Order",
    "preparation": "prepare",
    "shards": "PreparedData TokenStream open_prepared",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = [
    "DataConfig",
    "MicroBatch",
    "Order",
    "PreparedData",
    "TokenStream",
    "evaluation_batches",
    "micro_batch_at",
    "open_prepared",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
