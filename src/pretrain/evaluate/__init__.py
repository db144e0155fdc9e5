"""Weights -> numbers: nats, perplexity and bits per byte of text (`scorer`), log p(continuation |
context) of pairs (`continuations`), and what simple models reach (`baselines`).

There is one scorer, and everything that reports a number of a model goes through it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.evaluate.baselines import measure_baselines
    from pretrain.evaluate.continuations import Answer, Pair, encode_pair, score_pairs
    from pretrain.evaluate.scorer import Score, byte_lengths, score, score_each, score_texts

_HOMES = {
    "Answer": "continuations",
    "Pair": "continuations",
    "Score": "scorer",
    "byte_lengths": "scorer",
    "encode_pair": "continuations",
    "measure_baselines": "baselines",
    "score": "scorer",
    "score_each": "scorer",
    "score_pairs": "continuations",
    "score_texts": "scorer",
}
__all__ = [
    "Answer",
    "Pair",
    "Score",
    "byte_lengths",
    "encode_pair",
    "measure_baselines",
    "score",
    "score_each",
    "score_pairs",
    "score_texts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
