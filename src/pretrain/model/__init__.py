"""Ids -> hidden states -> loss, on one device and without files.

`families` has the axes of the architecture, the families and the published sizes; `config` the
settings, `sizes` counts parameters and FLOP. `decoder` is the model, `layers` the parts of a block,
`rope` position encodings, `ngrams` the tables of the family `fast`, `dropout` reproducible dropout
masks, `fused` faster forms of small functions. `loss` is the training loss.

The capital letters at the end of a tensor's name are its shape: B rows, T positions, S cached and
new positions, D model width, H heads, K key/value heads, E head width, F feed-forward width, V
vocabulary, N = B T, P columns with padding or parts of an embedding, X any leading dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig
    from pretrain.model.decoder import Decoder, build
    from pretrain.model.layers import KeyValueCache
    from pretrain.model.loss import LMLoss
    from pretrain.model.sizes import n_parameters

__getattr__ = lazily(
    __name__,
    config="ModelConfig",
    decoder="Decoder build",
    layers="KeyValueCache",
    loss="LMLoss",
    sizes="n_parameters",
)
__all__ = ["Decoder", "KeyValueCache", "LMLoss", "ModelConfig", "build", "n_parameters"]
