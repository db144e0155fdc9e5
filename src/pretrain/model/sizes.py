"""Parameters and FLOP of a model by arithmetic: nothing is built, and torch is not imported."""

from __future__ import annotations

from pretrain.model.config import ModelConfig
from pretrain.model.families import has_final_norm, is_gated


def n_parameters(config: ModelConfig, *, vocab_size: int) -> int:
    """Return the number of parameters; a tied head is counted once."""
    d, f = config.d_model, config.feed_forward_width
    d_kv = config.kv_heads * config.d_head

    biases_of_block = 0
    if config.has_bias("query_key_value"):
        biases_of_block += d + 2 * d_kv
    if config.has_bias("output"):
        biases_of_block += d
    if config.has_bias("feed_forward"):
        biases_of_block += f + d
        if is_gated(config.feed_forward):
            biases_of_block += f

    norm = 2 * d if config.has_bias("norm") else d
    n_norms = 2 * config.n_layers
    if has_final_norm(config.norm_place):
        n_norms += 1

    # The matrices include the head's, which is the token embedding's where it is tied.
    embeddings = config.table_rows(vocab_size) * d
    if not config.tied_head:
        embeddings += vocab_size * d
    if config.position == "learned":
        embeddings += config.window_tokens * d

    matrices = n_matmul_parameters(config, vocab_size=vocab_size)
    return matrices + embeddings + config.n_layers * biases_of_block + n_norms * norm


def n_matmul_parameters(config: ModelConfig, *, vocab_size: int) -> int:
    """Return the number of weights that every token is multiplied with.

    These are all matrices, with the head's also where it is tied, and no table of embeddings.
    """
    d, f = config.d_model, config.feed_forward_width
    d_kv = config.kv_heads * config.d_head
    attention = 2 * d * d + 2 * d * d_kv
    feed_forward = (3 if is_gated(config.feed_forward) else 2) * d * f
    return config.n_layers * (attention + feed_forward) + vocab_size * d


def training_flops(config: ModelConfig, *, vocab_size: int) -> int:
    """Return the FLOP of a training step for each token, 6 N + 6 L d T.

    N is the number of weights that a token is multiplied with, L d T the cost of attention, of
    which only the causal half is counted: "PaLM" (Chowdhery et al., 2022), appendix B.
    """
    attention = config.n_layers * config.d_model * config.window_tokens
    return 6 * (n_matmul_parameters(config, vocab_size=vocab_size) + attention)
