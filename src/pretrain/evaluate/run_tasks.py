"""A model's answers to the examples of a task, and what they amount to.

A decoder, its tokenizer and examples come in; statistics of every metric of the kind, and a line
for each example, go out. All options of all examples are asked at once, so that rows of about the
same length go through the model together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pretrain.distributed import World
from pretrain.evaluate.bootstrap import estimate
from pretrain.evaluate.examples import Example, compared_part
from pretrain.evaluate.loglikelihood import PairScore, encode_pair, score_pairs
from pretrain.evaluate.metrics import Array, statistics_of_answer
from pretrain.evaluate.task_files import EvalTask
from pretrain.evaluate.tasks import Task
from pretrain.generate import Sampling, generate_ids
from pretrain.model import Decoder
from pretrain.tokenizer import Tokenizer

Rows = dict[str, list[tuple[float, ...]]]

_SEED = 1  # of the bootstrap: what `pretrain evaluate` takes by default
# Examples of each task that are timed before a run starts.
_TIMED = 10


@dataclass(frozen=True, slots=True)
class TaskResults:
    """What a model said to one task."""

    statistics: dict[str, Array]
    """By metric (examples, k): what metrics.value makes a number of."""
    lines: list[dict[str, Any]]
    """What was said to each example, for people to look at."""
    n_cut: int
    """Examples of which a context did not fit the model and lost its left."""


def evaluate_task(
    decoder: Decoder,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    *,
    world: World,
    precision: str = "fp32",
    stride: int | None = None,
) -> TaskResults:
    """Ask a model all examples of a task. `stride` is of the windows of what is longer than the
    context."""
    if task.kind == "answer":
        return _open_answers(decoder, tokenizer, task, examples, world=world, precision=precision)
    asked = [pair for example in examples for pair in example.options(task.delimiter)]
    before = _unconditional(task, examples) if task.kind == "choice" else []
    pairs = [encode_pair(tokenizer, *pair) for pair in asked + before]
    answers = score_pairs(decoder, pairs, world=world, precision=precision, stride=stride)
    plain, alone = iter(answers[: len(asked)]), iter(answers[len(asked) :])
    rows: Rows = {}
    lines: list[dict[str, Any]] = []
    n_cut = 0
    for number, example in enumerate(examples):
        options = [next(plain) for _ in example.options("")]
        n_cut += any(option.is_cut for option in options)
        line: dict[str, Any] = {"example": number, "gold": example.gold}
        line["options"] = [
            {"log_p": -o.nats, "tokens": o.tokens, "is_greedy": o.is_greedy} for o in options
        ]
        if task.kind == "choice":
            for option in line["options"]:
                option["unconditional_log_p"] = -next(alone).nats
        for metric, row in _ROWS[task.kind](example, options, line).items():
            rows.setdefault(metric, []).append(row)
        lines.append(line)
    return TaskResults(_arrays(rows), lines, n_cut)


def evaluate_in_loop(
    decoder: Decoder,
    tokenizer: Tokenizer,
    followed: EvalTask,
    *,
    world: World,
    precision: str = "fp32",
) -> dict[str, Any]:
    """The task's metric over the examples, its standard error (None for one example), what guessing
    reaches, and the seconds that it took: what `pretrain evaluate --limit` gives."""
    began = time.perf_counter()
    task, examples = followed.task, followed.examples
    results = evaluate_task(decoder, tokenizer, task, examples, world=world, precision=precision)
    found = estimate(task.metric, results.statistics[task.metric], seed=_SEED)
    return {
        "task": task.name,
        "metric": task.metric,
        "value": found.value,
        "stderr": found.stderr,
        "examples": len(examples),
        "chance": followed.chance,
        "seconds": time.perf_counter() - began,
    }


def evaluation_seconds(
    decoder: Decoder,
    tokenizer: Tokenizer,
    followed: Sequence[EvalTask],
    *,
    world: World,
    precision: str = "fp32",
) -> float:
    """About how long it takes to ask everything once, from some examples of each. Caches warm up
    meanwhile and small batches are slower, so it is rather less."""
    seconds = 0.0
    for each in followed:
        some = replace(each, examples=each.examples[:_TIMED])
        row = evaluate_in_loop(decoder, tokenizer, some, world=world, precision=precision)
        seconds += row["seconds"] * len(each.examples) / len(some.examples)
    return seconds


def _unconditional(task: Task, examples: Sequence[Example]) -> list[tuple[str, str]]:
    """The same choices without their question."""
    return [(task.unconditional, task.delimiter + c) for e in examples for c in e.continuations]


def _arrays(rows: Rows) -> dict[str, Array]:
    return {metric: np.array(each, np.float64) for metric, each in rows.items()}


def _chosen(example: Example, scores: Sequence[float], line: dict[str, Any], metric: str) -> Any:
    """1 of 1 where the largest score is the right option's; of equal ones the first is taken. A
    model that has no numbers is not right: nan."""
    taken = int(np.argmax(scores))
    line.setdefault("taken", {})[metric] = taken
    return math.nan if np.isnan(scores).any() else float(taken == example.gold), 1.0


def _of_choices(
    example: Example, options: Sequence[PairScore], line: dict[str, Any]
) -> dict[str, tuple[float, ...]]:
    """Every normalisation that papers use, side by side: none (GPT-2), a token (GPT-3), a character
    (Llama, lm-evaluation-harness' acc_norm), a byte (its acc_bytes), and the choice's own
    probability without the question (GPT-3)."""
    log_p = np.array([-option.nats for option in options])
    texts = example.continuations
    alone = np.array([option["unconditional_log_p"] for option in line["options"]])
    scores = {
        "accuracy": log_p,
        "accuracy_per_token": log_p / [option.tokens for option in options],
        "accuracy_per_character": log_p / [len(text) for text in texts],
        "accuracy_per_byte": log_p / [len(text.encode("utf-8", "replace")) for text in texts],
        "accuracy_unconditional": log_p - alone,
    }
    return {metric: _chosen(example, each, line, metric) for metric, each in scores.items()}


def _of_options(
    example: Example, options: Sequence[PairScore], line: dict[str, Any]
) -> dict[str, tuple[float, ...]]:
    return {"accuracy": _chosen(example, [-o.nats for o in options], line, "accuracy")}


def _of_clozes(
    example: Example, options: Sequence[PairScore], line: dict[str, Any]
) -> dict[str, tuple[float, ...]]:
    """The word is right where greedy decoding would write it; perplexity is a word's."""
    (word,), (text,) = options, example.continuations
    n_bytes = len(text.encode("utf-8", "replace"))
    return {
        "accuracy": (float(word.is_greedy), 1.0),
        "perplexity": (word.nats, 1.0),
        "bits_per_byte": (word.nats / math.log(2), n_bytes),
    }


def _of_texts(
    example: Example, options: Sequence[PairScore], line: dict[str, Any]
) -> dict[str, tuple[float, ...]]:
    (whole,), (text,) = options, example.continuations
    n_bytes = len(text.encode("utf-8", "replace"))
    return {
        "perplexity": (whole.nats, whole.tokens),
        "word_perplexity": (whole.nats, len(text.split())),
        "bits_per_byte": (whole.nats / math.log(2), n_bytes),
    }


def _of_pairs(
    example: Example, options: Sequence[PairScore], line: dict[str, Any]
) -> dict[str, tuple[float, ...]]:
    """A half where both are as likely: the good one always stands first."""
    good, bad = (option.nats for option in options)
    right, count = _chosen(example, [-good, -bad], line, "accuracy")
    return {"accuracy": (0.5 if good == bad else right, count)}


_ROWS: dict[str, Callable[..., dict[str, tuple[float, ...]]]] = {
    "choice": _of_choices,
    "schema": _of_options,
    "pair": _of_pairs,
    "cloze": _of_clozes,
    "text": _of_texts,
}


def _open_answers(
    decoder: Decoder,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    *,
    world: World,
    precision: str,
) -> TaskResults:
    writer = Writer(decoder, tokenizer, task, world=world, precision=precision)
    # Words that are compared without punctuation say nothing of numbers.
    usual = () if task.answer_after else ("exact_match", "f1")
    metrics = dict.fromkeys((*usual, task.metric))
    rows: Rows = {metric: [] for metric in metrics}
    lines: list[dict[str, Any]] = []
    n_cut = 0
    for number, example in enumerate(examples):
        answer, is_cut = writer.answer(example.contexts[0])
        n_cut += is_cut
        compared, *references = (compared_part(task, t) for t in (answer, *example.continuations))
        for metric in metrics:
            rows[metric].append(statistics_of_answer(metric, compared, references))
        lines.append(
            {"example": number, "answer": answer, "references": list(example.continuations)}
        )
    return TaskResults(_arrays(rows), lines, n_cut)


class Writer:
    """Writes a model's answers to one task: greedily, up to the first of the task's stops."""

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, task: Task, *, world: World, precision: str
    ) -> None:
        self._decoder, self._tokenizer, self._task = decoder, tokenizer, task
        self._world, self._precision = world, precision
        window = decoder.config.window_tokens
        # At least half of the window is the prompt's: an answer may outgrow it.
        self._room = max(1, window // 2, window - task.max_tokens)
        self._ends = ends_of(tokenizer, task.stops)

    def answer(self, context: str) -> tuple[str, bool]:
        """The answer, without white space around it, and whether the context lost its left."""
        ids = self._tokenizer.encode_prompt(context)
        with self._world.autocast(self._precision):
            (found,) = generate_ids(
                self._decoder,
                ids[-self._room :],
                max_tokens=self._task.max_tokens,
                sampling=Sampling(temperature=0.0),
                stop_ids=self._ends,
            )
        answer = cut_before(self._tokenizer.decode(found), self._task.stops)
        return answer.strip(), len(ids) > self._room


def ends_of(tokenizer: Tokenizer, stops: Sequence[str]) -> set[int]:
    """Ids of which nothing is kept in an answer that ends before the first of `stops`, so that
    nothing needs to be written after them."""
    begins = tuple(stop.encode() for stop in stops)
    ends = {i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i).startswith(begins)}
    return ends | {tokenizer.start_of_text, *tokenizer.stop_ids}


def cut_before(text: str, stops: Sequence[str]) -> str:
    """What stands before the first of `stops`."""
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text)
