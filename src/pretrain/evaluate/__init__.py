"""Weights -> numbers: nats, perplexity and bits per byte (`scorer`), and what simple models reach
(`baselines`).

There is one scorer, and everything that reports a number of a model goes through it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.evaluate.baselines import measure_baselines
    from pretrain.evaluate.scorer import Score, byte_lengths, score, score_texts

_HOMES = {
    "Score": "scorer",
    "byte_lengths": "scorer",
    "measure_baselines": "baselines",
    "score": "scorer",
    "score_texts": "scorer",
}
__all__ = ["Score", "byte_lengths", "measure_baselines", "score", "score_texts"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
