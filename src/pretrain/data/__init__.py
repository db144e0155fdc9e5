"""Documents -> shards -> batches.

`prepare` turns a corpus into a folder of ids, `shards` writes and reads such a folder, `order` says
which window is sample number s, `batches` makes tensors of windows. The first three are free of
torch; text ends at the shards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.data.batches import MicroBatch, evaluation_batches, micro_batch_at
    from pretrain.data.config import DataConfig
    from pretrain.data.order import Order
    from pretrain.data.preparation import prepare
    from pretrain.data.shards import PreparedData, TokenStream, open_prepared

__getattr__ = lazily(
    __name__,
    batches="MicroBatch evaluation_batches micro_batch_at",
    config="DataConfig",
    order="Order",
    preparation="prepare",
    shards="PreparedData TokenStream open_prepared",
)
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
