"""Weights -> text: generate tokens, or return the distribution of the next one.

`sampling` has the sampling parameters, generation of ids and of texts, and the next-token
distribution; `packing` stores a decoder's weights for fast generation on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.generate.packing import pack_weights
    from pretrain.generate.sampling import Sampling, generate, generate_ids, next_distribution

__getattr__ = lazily(
    __name__,
    packing="pack_weights",
    sampling="Sampling generate generate_ids next_distribution",
)
__all__ = ["Sampling", "generate", "generate_ids", "next_distribution", "pack_weights"]
