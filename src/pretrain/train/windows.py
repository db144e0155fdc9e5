"""How long a window is and how many make a batch: decided and checked before torch is imported."""

from __future__ import annotations

from pretrain.data.order import Order
from pretrain.model.config import ModelConfig
from pretrain.train.config import TrainConfig

DEFAULT_CONTEXT = 128
DEFAULT_BATCH_TOKENS = 8192


def check_windows(model: ModelConfig, train: TrainConfig, *, n_tokens: int) -> tuple[int, int]:
    """The context length and the targets in a batch for a training text of `n_tokens` ids.

    Raises ValueError for a context that the text is too short for, a batch that is not whole
    windows, and a micro-batch that does not divide the batch.
    """
    context = _context_length(model, n_tokens)
    batch_tokens = train.batch_tokens or max(1, DEFAULT_BATCH_TOKENS // context) * context
    rows, rest = divmod(batch_tokens, context)
    if rest:
        legal = f"{rows * context:,} or {(rows + 1) * context:,}" if rows else f"{context:,}"
        raise ValueError(
            f"train.batch_tokens {batch_tokens:,} is not a multiple of model.context_length "
            f"{context:,}; the nearest that are: {legal}"
        )
    micro = train.micro_batch_rows
    if micro is not None and rows % micro:
        legal = ", ".join(str(m) for m in range(1, rows + 1) if rows % m == 0)
        raise ValueError(
            f"train.micro_batch_rows {micro} does not divide the {rows} windows of a batch; "
            f"legal: {legal}"
        )
    return context, batch_tokens


def _context_length(model: ModelConfig, n_tokens: int) -> int:
    context = model.context_length
    if context is None:
        # Eight windows at least, so that even a page of text has an order to be shuffled.
        context = DEFAULT_CONTEXT
        while context > 8 and n_tokens < 8 * context:
            context //= 2
    try:
        Order(n_tokens, context, seed=0)
    except ValueError as error:
        raise ValueError(f"model.context_length is too long: {error}") from None
    return context
