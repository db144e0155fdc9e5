"""Weights -> numbers: nats, perplexity and bits per byte of text (`scorer`), log p(continuation |
context) of pairs (`continuations`), and what simple models reach (`baselines`).

A task is a definition (`tasks`) and examples from a file (`examples`); answers to them (`results`)
become numbers (`metrics`) with errors, or a comparison of models (`errors`). Some are asked again
and again while a model is trained (`following`, `config`). `cards` goes through a text token by
token.

There is one scorer, and everything that reports a number of a model goes through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.evaluate.baselines import measure_baselines
    from pretrain.evaluate.cards import Expectation, look_at, pieces
    from pretrain.evaluate.continuations import Answer, Pair, encode_pair, score_pairs
    from pretrain.evaluate.errors import compare, estimate
    from pretrain.evaluate.examples import Example, read_examples
    from pretrain.evaluate.following import Followed
    from pretrain.evaluate.results import Results, ask, ask_followed
    from pretrain.evaluate.scorer import Score, byte_lengths, score, score_each, score_texts
    from pretrain.evaluate.tasks import Task, task_named

__getattr__ = lazily(
    __name__,
    baselines="measure_baselines",
    cards="Expectation look_at pieces",
    continuations="Answer Pair encode_pair score_pairs",
    errors="compare estimate",
    examples="Example read_examples",
    following="Followed",
    results="Results ask ask_followed",
    scorer="Score byte_lengths score score_each score_texts",
    tasks="Task task_named",
)
__all__ = [
    "Answer",
    "Example",
    "Expectation",
    "Followed",
    "Pair",
    "Results",
    "Score",
    "Task",
    "ask",
    "ask_followed",
    "byte_lengths",
    "compare",
    "encode_pair",
    "estimate",
    "look_at",
    "measure_baselines",
    "pieces",
    "read_examples",
    "score",
    "score_each",
    "score_pairs",
    "score_texts",
    "task_named",
]
