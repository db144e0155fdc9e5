"""Ids -> hidden states -> loss, on one device and without files.

`config` names the architecture and its families, `layers` holds the parts of a block, `decoder` the
stack and its initial weights, `lm_loss` the loss, `random` the counter-based numbers that initial
weights and dropout use.

Letters at the end of a tensor's name are its shape: B rows, T time, S cached time, D model, H
heads, K key/value heads, E head width, F feed-forward, V vocabulary; N is B and T in one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig, n_parameters
    from pretrain.model.decoder import Decoder, build
    from pretrain.model.layers import KeyValueCache
    from pretrain.model.loss import LMLoss

__getattr__ = lazily(
    __name__,
    config="ModelConfig n_parameters",
    decoder="Decoder build",
    layers="KeyValueCache",
    loss="LMLoss",
)
__all__ = ["Decoder", "KeyValueCache", "LMLoss", "ModelConfig", "build", "n_parameters"]
