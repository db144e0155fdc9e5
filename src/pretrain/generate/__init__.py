"""Weights -> text: draw tokens, or look at the distribution of the next one.

`sampling` holds how a distribution is shaped, how ids are drawn, and the two calls on text;
`layout` how a decoder lies in memory for it.
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
