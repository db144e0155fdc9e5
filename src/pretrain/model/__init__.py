"""Ids -> hidden states -> loss, on one device and without files.

`config` names the architecture and its families, `layers` holds the parts of a block, `decoder` the
stack and its initial weights, `objective` the loss, `random` the counter-based numbers that initial
weights and dropout use.

Letters at the end of a tensor's name are its shape: B rows, T time, S cached time, D model, H
heads, K key/value heads, E head width, F feed-forward, V vocabulary; N is B and T in one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig, n_parameters
    from pretrain.model.decoder import Decoder, build
    from pretrain.model.layers import KeyValueCache
    from pretrain.model.objective import Objective

_NAMES = {
    "config": "ModelConfig n_parameters",
    "decoder": "Decoder build",
    "layers": "KeyValueCache",
    "objective": "Objective",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = ["Decoder", "KeyValueCache", "ModelConfig", "Objective", "build", "n_parameters"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
