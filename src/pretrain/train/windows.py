"""How long a window is and how many make a batch: decided and checked before torch is imported."""

from __future__ import annotations

from pretrain.data.order import Order
from pretrain.model.config import ModelConfig
from pretrain.train.config import TrainConfig, mistakes_of_batch

DEFAULT_CONTEXT = 128
DEFAULT_BATCH_TOKENS = 8192


def check_windows(model: ModelConfig, train: TrainConfig, *, n_tokens: int) -> tuple[int, int]:
    """The context length and the targets in a batch for a training text of `n_tokens` ids.

    Raises ValueError for a context that the text is too short for, a batch that is not whole
    windows, and a micro-batch that is larger than the batch.
    """
    context = _context_length(model, n_tokens)
    batch_tokens = train.batch_tokens or max(1, DEFAULT_BATCH_TOKENS // context) * context
    for _, sentence in mistakes_of_batch(
        batch_tokens, context_length=context, micro_batch_rows=train.micro_batch_rows
    ):
        raise ValueError(sentence)
    return context, batch_tokens


def _context_length(model: ModelConfig, n_tokens: int) -> int:
    context = model.context_length
    if context is None:
        # A power of 2, so that a batch stays whole windows when the dial is turned. And eight
        # windows at least, so that even a page of text has an order to be shuffled.
        context = DEFAULT_CONTEXT << ((model.size or 1).bit_length() - 1)
        while context > 8 and n_tokens < 8 * context:
            context //= 2
    try:
        Order(n_tokens, context, seed=0)
    except ValueError as error:
        raise ValueError(f"model.context_length is too long: {error}") from None
    return context
