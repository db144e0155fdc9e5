"""Documents -> shards -> batches.

`preparation` turns a corpus into a folder of token ids by the `stages` of a job (`jobs`), `writer`
writes such a folder and `format` reads it, `order` maps samples to windows, `mixed` joins several
sources, `trace` answers what a step read, and `batches` reads windows as tensors. Only `batches`
needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.data.batches import MicroBatch, evaluation_batches, micro_batch_at
    from pretrain.data.config import DataConfig
    from pretrain.data.format import PreparedData, TokenStream, open_prepared
    from pretrain.data.order import Order
    from pretrain.data.preparation import prepare

__getattr__ = lazily(
    __name__,
    batches="MicroBatch evaluation_batches micro_batch_at",
    config="DataConfig",
    format="PreparedData TokenStream open_prepared",
    order="Order",
    preparation="prepare",
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
