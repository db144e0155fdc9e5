"""A model and a task's examples -> statistics of every metric of the task.

All options of all examples are scored at once, so that rows of about the same length go through the
model together. Open answers are generated greedily. `evaluate_in_loop` does it for a run that is in
training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
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
from pretrain.generate.sampling import Sampling, generate_ids
from pretrain.model.decoder import Decoder
from pretrain.tokenizer.tokenizer import Tokenizer

Statistics = tuple[float, ...]
"""One example's contribution to a metric; `metrics.value` computes the metric from their sums."""

_BOOTSTRAP_SEED = 1  # the default of `pretrain evaluate --seed`
# Examples of each task that are timed before a run starts.
_N_TIMED_EXAMPLES = 10


@dataclass(frozen=True, slots=True)
class TaskResults:
    """What a model achieved on one task."""

    statistics: dict[str, Array]
    """By metric (examples, k): the input of `metrics.value`."""
    records: list[dict[str, Any]]
    """For each example the log-probabilities or the answer, for people to read."""
    n_truncated: int
    """Examples whose context did not fit the model and lost its left part."""


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
    """Evaluate a model on all examples of a task. Texts longer than the context are scored in
    windows that start every `stride` tokens."""
    if task.kind == "answer":
        return _open_answers(decoder, tokenizer, task, examples, world=world, precision=precision)

    options = [option for example in examples for option in example.options(task.delimiter)]
    # The same choices without their question.
    unconditional = [
        (task.unconditional, task.delimiter + choice)
        for example in examples
        for choice in example.continuations
        if task.kind == "choice"
    ]
    pairs = [encode_pair(tokenizer, *texts) for texts in options + unconditional]
    scores = score_pairs(decoder, pairs, world=world, precision=precision, stride=stride)
    option_scores = iter(scores[: len(options)])
    unconditional_scores = iter(scores[len(options) :])

    statistics: dict[str, list[Statistics]] = {}
    records: list[dict[str, Any]] = []
    n_truncated = 0
    for number, example in enumerate(examples):
        own_scores = [next(option_scores) for _ in example.options("")]
        n_truncated += any(score.is_truncated for score in own_scores)
        record: dict[str, Any] = {
            "example": number,
            "gold": example.gold,
            "options": [
                {"log_p": -score.nats, "tokens": score.tokens, "is_greedy": score.is_greedy}
                for score in own_scores
            ],
        }
        if task.kind == "choice":
            for option in record["options"]:
                option["unconditional_log_p"] = -next(unconditional_scores).nats
        for metric, row in example_statistics(task.kind, example, own_scores, record).items():
            statistics.setdefault(metric, []).append(row)
        records.append(record)
    return TaskResults(_arrays(statistics), records, n_truncated)


def evaluate_in_loop(
    decoder: Decoder,
    tokenizer: Tokenizer,
    eval_task: EvalTask,
    *,
    world: World,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Evaluate a task for the metrics log: the values of `pretrain evaluate --limit`, the accuracy
    of a random choice, and the seconds taken. The standard error of one example is None."""
    start_time = time.perf_counter()
    task = eval_task.task
    results = evaluate_task(
        decoder, tokenizer, task, eval_task.examples, world=world, precision=precision
    )
    estimated = estimate(task.metric, results.statistics[task.metric], seed=_BOOTSTRAP_SEED)
    return {
        "task": task.name,
        "metric": task.metric,
        "value": estimated.value,
        "stderr": estimated.stderr,
        "examples": len(eval_task.examples),
        "chance": eval_task.chance,
        "seconds": time.perf_counter() - start_time,
    }


def evaluation_seconds(
    decoder: Decoder,
    tokenizer: Tokenizer,
    eval_tasks: Iterable[EvalTask],
    *,
    world: World,
    precision: str = "fp32",
) -> float:
    """Estimate the seconds that all tasks take, from a few examples of each. Rather too many: the
    caches are cold, and small batches are slow."""
    seconds = 0.0
    for eval_task in eval_tasks:
        some = replace(eval_task, examples=eval_task.examples[:_N_TIMED_EXAMPLES])
        row = evaluate_in_loop(decoder, tokenizer, some, world=world, precision=precision)
        seconds += row["seconds"] * len(eval_task.examples) / len(some.examples)
    return seconds


def _arrays(statistics: dict[str, list[Statistics]]) -> dict[str, Array]:
    return {metric: np.array(rows, np.float64) for metric, rows in statistics.items()}


# Statistics of one example ------------------------------------------------------------------------


def example_statistics(
    kind: str, example: Example, options: Sequence[PairScore], record: dict[str, Any]
) -> dict[str, Statistics]:
    """The statistics of one example, by metric, from the scores of its options. The option that
    each metric selects is added to the record."""
    match kind:
        case "choice":
            return _choice_statistics(example, options, record)
        case "schema":
            return {"accuracy": _selection(example, [-o.nats for o in options], record, "accuracy")}
        case "pair":
            good, bad = options
            is_right, n = _selection(example, [-good.nats, -bad.nats], record, "accuracy")
            # The good one always comes first, so of equally likely ones each is half right.
            return {"accuracy": (0.5 if good.nats == bad.nats else is_right, n)}
    (score,) = options
    (text,) = example.continuations
    bits_per_byte = (score.nats / math.log(2), len(text.encode("utf-8", "replace")))
    if kind == "cloze":  # right if greedy decoding generates the word; perplexity is per word
        return {
            "accuracy": (float(score.is_greedy), 1.0),
            "perplexity": (score.nats, 1.0),
            "bits_per_byte": bits_per_byte,
        }
    return {
        "perplexity": (score.nats, score.tokens),
        "word_perplexity": (score.nats, len(text.split())),
        "bits_per_byte": bits_per_byte,
    }


def _choice_statistics(
    example: Example, options: Sequence[PairScore], record: dict[str, Any]
) -> dict[str, Statistics]:
    """Accuracy under every normalisation of log p that papers use: none (GPT-2), per token (GPT-3),
    per character (Llama, acc_norm of lm-evaluation-harness), per byte (its acc_bytes), and relative
    to the choice's probability without the question (GPT-3)."""
    log_p = np.array([-option.nats for option in options])
    texts = example.continuations
    unconditional = np.array([option["unconditional_log_p"] for option in record["options"]])
    normalised = {
        "accuracy": log_p,
        "accuracy_per_token": log_p / [option.tokens for option in options],
        "accuracy_per_character": log_p / [len(text) for text in texts],
        "accuracy_per_byte": log_p / [len(text.encode("utf-8", "replace")) for text in texts],
        "accuracy_unconditional": log_p - unconditional,
    }
    return {
        metric: _selection(example, values, record, metric) for metric, values in normalised.items()
    }


def _selection(
    example: Example, values: Sequence[float] | Array, record: dict[str, Any], metric: str
) -> Statistics:
    """(1 or 0, 1): whether the largest value is the gold option's; the first of equal ones counts.
    A model whose values are NaN is not right but NaN."""
    selected = int(np.argmax(values))
    record.setdefault("taken", {})[metric] = selected
    return math.nan if np.isnan(values).any() else float(selected == example.gold), 1.0


# Open answers -------------------------------------------------------------------------------------


def _open_answers(
    decoder: Decoder,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    *,
    world: World,
    precision: str,
) -> TaskResults:
    generator = AnswerGenerator(decoder, tokenizer, task, world=world, precision=precision)
    metrics = [task.metric]
    # exact_match and f1 ignore punctuation, so they cannot judge numbers.
    if not task.answer_after:
        metrics = list(dict.fromkeys(("exact_match", "f1", task.metric)))
    statistics: dict[str, list[Statistics]] = {metric: [] for metric in metrics}
    records: list[dict[str, Any]] = []
    n_truncated = 0
    for number, example in enumerate(examples):
        answer, is_truncated = generator.answer(example.contexts[0])
        n_truncated += is_truncated
        compared = compared_part(task, answer)
        references = [compared_part(task, reference) for reference in example.continuations]
        for metric in metrics:
            statistics[metric].append(statistics_of_answer(metric, compared, references))
        records.append(
            {"example": number, "answer": answer, "references": list(example.continuations)}
        )
    return TaskResults(_arrays(statistics), records, n_truncated)


class AnswerGenerator:
    """Generates the answers to one task: greedily, up to the first of the task's stop strings."""

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, task: Task, *, world: World, precision: str
    ) -> None:
        self._decoder, self._tokenizer, self._task = decoder, tokenizer, task
        self._world, self._precision = world, precision
        context = decoder.config.window_tokens
        # A prompt gets at least half of the context; a longer answer reads its own end only.
        self._max_prompt_tokens = max(1, context // 2, context - task.max_tokens)
        self._stop_ids = stop_ids_of(tokenizer, task.stops)

    def answer(self, prompt: str) -> tuple[str, bool]:
        """The answer, without white space around it, and whether the prompt was truncated."""
        ids = self._tokenizer.encode_prompt(prompt)
        with self._world.autocast(self._precision):
            (generated,) = generate_ids(
                self._decoder,
                ids[-self._max_prompt_tokens :],
                max_tokens=self._task.max_tokens,
                sampling=Sampling(temperature=0.0),
                stop_ids=self._stop_ids,
            )
        answer = cut_at_stop(self._tokenizer.decode(generated), self._task.stops)
        return answer.strip(), len(ids) > self._max_prompt_tokens


def stop_ids_of(tokenizer: Tokenizer, stops: Sequence[str]) -> set[int]:
    """Ids after which generation can stop: the tokens that begin with a stop string, and the ends
    of a text."""
    stop_bytes = tuple(stop.encode() for stop in stops)
    ids = {
        id_
        for id_ in range(tokenizer.vocab_size)
        if tokenizer.token_bytes(id_).startswith(stop_bytes)
    }
    return ids | {tokenizer.start_of_text, *tokenizer.stop_ids}


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text)
