"""Weights -> text: draw tokens, or look at the distribution of the next one.

`sampling` holds how a distribution is shaped, how ids are drawn, and the two calls on text;
`layout` how a decoder lies in memory for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.generate.layout import lay_out_for_generation
    from pretrain.generate.sampling import Sampling, generate, generate_ids, next_distribution

__all__ = [
    "Sampling",
    "generate",
    "generate_ids",
    "lay_out_for_generation",
    "next_distribution",
]
_NAMES = {
    "layout": "lay_out_for_generation",
    "sampling": "Sampling generate generate_ids next_distribution",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
