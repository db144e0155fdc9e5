"""A model and a task's examples -> statistics of every metric of the task.

All options of all examples are scored at once, so that rows of about the same length go through the
model together. Open answers are generated greedily. `evaluate_in_loop` does it for a run that is in
training, and `condition_metrics` measures the effect of naming the task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from pretrain.corpus.demonstrations import split_sentences
from pretrain.evaluate.bootstrap import compare, estimate
from pretrain.evaluate.examples import Example, compared_part, cut_at_stop, prompt
from pretrain.evaluate.loglikelihood import PairScore, encode_pair, score_pairs
from pretrain.evaluate.loss import Model
from pretrain.evaluate.metrics import Array, statistics_of_answer, value
from pretrain.evaluate.task_files import EvalTask
from pretrain.evaluate.tasks import Task, task_named
from pretrain.generate.sampling import Sampling, generate_ids
from pretrain.tokenizer.tokenizer import Tokenizer

Statistics = tuple[float, ...]
"""One example's contribution to a metric; `metrics.value` computes the metric from their sums."""
_Evaluated = tuple[dict[str, Any], dict[str, Statistics], bool]
"""The record of one example, its statistics by metric, and whether its context was truncated."""

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
    model: Model, task: Task, examples: Sequence[Example], *, stride: int | None = None
) -> TaskResults:
    """Evaluate a model on the examples of a task, at least one. Texts longer than the context are
    scored in windows that start every `stride` tokens."""
    if task.kind == "answer":
        evaluated = _answer_questions(model, task, examples)
    else:
        evaluated = _score_options(model, task, examples, stride)
    records, rows, is_truncated = zip(*evaluated, strict=True)
    statistics = {m: np.array([row[m] for row in rows], np.float64) for m in rows[0]}
    return TaskResults(statistics, list(records), sum(is_truncated))


def evaluate_in_loop(model: Model, eval_task: EvalTask) -> dict[str, Any]:
    """Evaluate a task for the metrics log: the values of `pretrain evaluate --limit`, the accuracy
    of a random choice, and the seconds taken. The standard error of one example is None."""
    start_time = time.perf_counter()
    task = eval_task.task
    results = evaluate_task(model, task, eval_task.examples)
    estimated = estimate(task.metric, results.statistics[task.metric], seed=eval_task.seed)
    return {
        "task": task.name,
        "metric": task.metric,
        "value": estimated.value,
        "stderr": estimated.stderr,
        "examples": len(eval_task.examples),
        "chance": eval_task.chance,
        "seconds": time.perf_counter() - start_time,
    }


def evaluation_seconds(model: Model, eval_tasks: Iterable[EvalTask]) -> float:
    """Estimate the seconds that all tasks take, from a few examples of each. Rather too many: the
    caches are cold, and small batches are slow."""
    seconds = 0.0
    for eval_task in eval_tasks:
        some = replace(eval_task, examples=eval_task.examples[:_N_TIMED_EXAMPLES])
        row = evaluate_in_loop(model, some)
        seconds += row["seconds"] * len(eval_task.examples) / len(some.examples)
    return seconds


# Scored options -----------------------------------------------------------------------------------


def _score_options(
    model: Model, task: Task, examples: Sequence[Example], stride: int | None
) -> Iterator[_Evaluated]:
    options = [option for example in examples for option in example.options(task.delimiter)]
    # The same choices without their question.
    unconditional = [
        (task.unconditional, task.delimiter + choice)
        for example in examples
        for choice in example.continuations
        if task.kind == "choice"
    ]
    pairs = [encode_pair(model.tokenizer, *texts) for texts in options + unconditional]
    scores = score_pairs(model, pairs, stride=stride)
    option_scores, unconditional_scores = iter(scores[: len(options)]), iter(scores[len(options) :])
    for number, example in enumerate(examples):
        own_scores = [next(option_scores) for _ in example.options("")]
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
        statistics = example_statistics(task.kind, example, own_scores, record)
        yield record, statistics, any(score.is_truncated for score in own_scores)


def example_statistics(
    kind: str, example: Example, options: Sequence[PairScore], record: dict[str, Any]
) -> dict[str, Statistics]:
    """The statistics of one example, by metric, from the scores of its options. The option that
    each metric selects is added to the record.

    A choice has the accuracy under every normalisation of log p that papers use: none (GPT-2), per
    token (GPT-3), per character (Llama, acc_norm of lm-evaluation-harness), per byte (its
    acc_bytes), and relative to the choice's probability without the question (GPT-3).
    """
    log_p = np.array([-option.nats for option in options])
    texts = example.continuations
    n_bytes = [len(text.encode("utf-8", "replace")) for text in texts]
    if kind == "choice":
        unconditional = np.array([option["unconditional_log_p"] for option in record["options"]])
        normalised = {
            "accuracy": log_p,
            "accuracy_per_token": log_p / [option.tokens for option in options],
            "accuracy_per_character": log_p / [len(text) for text in texts],
            "accuracy_per_byte": log_p / n_bytes,
            "accuracy_unconditional": log_p - unconditional,
        }
        return {m: _selection(example, values, record, m) for m, values in normalised.items()}
    if kind in ("schema", "pair"):
        is_right, n = _selection(example, log_p, record, "accuracy")
        # The good one of a pair always comes first, so of equally likely ones each is half right.
        is_tie = kind == "pair" and log_p[0] == log_p[1]
        return {"accuracy": (0.5 if is_tie else is_right, n)}
    (score,) = options
    bits_per_byte = (score.nats / math.log(2), n_bytes[0])
    if kind == "cloze":  # right if greedy decoding generates the word; perplexity is per word
        return {
            "accuracy": (float(score.is_greedy), 1.0),
            "perplexity": (score.nats, 1.0),
            "bits_per_byte": bits_per_byte,
        }
    return {
        "perplexity": (score.nats, score.tokens),
        "word_perplexity": (score.nats, len(texts[0].split())),
        "bits_per_byte": bits_per_byte,
    }


def _selection(example: Example, values: Array, record: dict[str, Any], metric: str) -> Statistics:
    """(1 or 0, 1): whether the largest value is the gold option's; the first of equal ones counts.
    A model whose values are NaN is not right but NaN."""
    selected = int(np.argmax(values))
    record.setdefault("taken", {})[metric] = selected
    return math.nan if np.isnan(values).any() else float(selected == example.gold), 1.0


# Open answers -------------------------------------------------------------------------------------


def _answer_questions(
    model: Model, task: Task, examples: Sequence[Example]
) -> Iterator[_Evaluated]:
    # exact_match and f1 ignore punctuation, so they cannot judge numbers.
    others = () if task.answer_after else ("exact_match", "f1")
    metrics = dict.fromkeys((*others, task.metric))
    for number, example in enumerate(examples):
        answer, is_truncated = generate_answer(model, task, example.contexts[0])
        compared = compared_part(task, answer)
        references = [compared_part(task, reference) for reference in example.continuations]
        yield (
            {"example": number, "answer": answer, "references": list(example.continuations)},
            {metric: statistics_of_answer(metric, compared, references) for metric in metrics},
            is_truncated,
        )


def generate_answer(model: Model, task: Task, context: str) -> tuple[str, bool]:
    """Answer greedily, up to the first of the task's stop strings: the answer without white space
    around it, and whether the context was truncated."""
    window = model.decoder.config.window_tokens
    # A context gets at least half of the window; a longer answer reads its own end only.
    n_context = max(1, window // 2, window - task.max_tokens)
    ids = model.tokenizer.encode_prompt(context)
    greedy = Sampling(temperature=0.0)
    answer = continue_ids(
        model, ids[-n_context:], max_tokens=task.max_tokens, sampling=greedy, stops=task.stops
    )
    text = cut_at_stop(model.tokenizer.decode(answer), task.stops)
    return text.strip(), len(ids) > n_context


def continue_ids(
    model: Model,
    ids: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    stops: tuple[str, ...] = (),
) -> list[int]:
    """Generate ids after `ids` in the model's precision: at most `max_tokens`, up to one that
    begins with a stop string or ends a text."""
    with model.world.autocast(model.precision):
        (generated,) = generate_ids(
            model.decoder,
            ids,
            max_tokens=max_tokens,
            sampling=sampling,
            stop_ids=stop_ids_of(model.tokenizer, stops),
        )
    return generated


@lru_cache(maxsize=16)
def stop_ids_of(tokenizer: Tokenizer, stops: tuple[str, ...]) -> set[int]:
    """Ids after which generation can stop: the tokens that begin with a stop string, and the ends
    of a text."""
    stop_bytes = tuple(stop.encode() for stop in stops)
    tokens = enumerate(tokenizer.encoder.token_bytes)
    ids = {id_ for id_, token in tokens if token.startswith(stop_bytes)}
    return ids | {tokenizer.start_of_text, *tokenizer.stop_ids}


# The effect of naming the task --------------------------------------------------------------------


def condition_metrics(
    model: Model, eval_task: EvalTask, *, stride: int | None = None
) -> dict[str, Any]:
    """Nats per byte of each example's first reference after the task itself, another task with the
    same input, and the input alone; the p-values of the differences to the task itself; and the
    task's metric for two answers without a model: the input itself, and its first sentence.

    "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) conditions on the
    task in the same way, by words before the answer.
    """
    task, examples = eval_task.task, eval_task.examples
    # Without shots, which would name the task in another way.
    wrong = task_named(task.wrong)
    contexts = {
        "task": [(prompt(task, e.input), task.delimiter) for e in examples],
        "wrong": [(prompt(wrong, e.input), wrong.delimiter) for e in examples],
        "none": [(e.input, task.delimiter) for e in examples],
    }
    references = [example.continuations[0] for example in examples]
    pairs = [
        encode_pair(model.tokenizer, context, delimiter + reference)
        for of_condition in contexts.values()
        for (context, delimiter), reference in zip(of_condition, references, strict=True)
    ]
    scores = score_pairs(model, pairs, stride=stride)
    all_nats = np.array([score.nats for score in scores]).reshape(len(contexts), -1)
    n_bytes = np.array([len(t.encode("utf-8", "replace")) for t in references], np.float64)
    nats = {
        name: np.stack([row, n_bytes], axis=1) for name, row in zip(contexts, all_nats, strict=True)
    }
    baselines = {}
    for name, answers in {
        "copy": [example.input for example in examples],
        "lead": [split_sentences(example.input)[0] for example in examples],
    }.items():
        rows = [
            statistics_of_answer(task.metric, answer, example.continuations)
            for answer, example in zip(answers, examples, strict=True)
        ]
        baselines[name] = float(value(task.metric, np.sum(rows, 0, np.float64)))
    return {
        "nats_per_byte": {
            name: float(value("nats_per_byte", each.sum(0))) for name, each in nats.items()
        },
        "p": {
            name: compare("nats_per_byte", nats["task"], nats[name], seed=eval_task.seed).p
            for name in ("wrong", "none")
        },
        "baselines": baselines,
    }
