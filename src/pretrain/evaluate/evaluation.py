"""`evaluate`: texts and tasks -> one result, with every number, its protocol and its lines.

What `pretrain evaluate` prints and what a Python program gets are the same object. Nothing is
printed here; a `log` function receives the lines as they are ready.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pretrain.corpus.documents import Document
from pretrain.data.batches import resolve_stride
from pretrain.data.format import TokenStream
from pretrain.evaluate.bootstrap import estimate
from pretrain.evaluate.loss import Model, Score, score_each, score_stream
from pretrain.evaluate.metrics import Array
from pretrain.evaluate.overlap import document_texts
from pretrain.evaluate.run_tasks import TaskResults, condition_metrics, evaluate_task
from pretrain.evaluate.task_files import EvalTask, load_tasks, read_whole
from pretrain.evaluate.token_stats import bits_per_byte_error


@dataclass(slots=True)
class Evaluation:
    """Everything that was measured of a model: the content of `pretrain evaluate --json`."""

    text: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By file: nats, tokens, bytes, words, perplexity, word_perplexity, bits_per_byte and
    its bits_per_byte_stderr, over documents or, of held-out text, over blocks of it"""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By task: metric, value, stderr, detectable, examples, and `metrics` with all of its kind"""
    protocol: dict[str, str] = field(default_factory=dict)
    """How texts (`text`) and each task were evaluated, in words"""
    results: list[tuple[EvalTask, TaskResults]] = field(default_factory=list)
    """The statistics and the answer to each example"""
    statistics: dict[tuple[str, str], Array] = field(default_factory=dict)
    """By text or task, and metric: a row for each document or example, to compare models by"""
    documents: dict[str, list[Document]] = field(default_factory=dict)
    """Those of each file"""

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "tasks": self.tasks, "protocol": self.protocol}


def evaluate(
    model: Model,
    files: Sequence[str] = (),
    *,
    tasks: Iterable[str | EvalTask] = (),
    task_data: str | None = None,
    held_out: TokenStream | None = None,
    text_field: str | None = None,
    stride: int | None = None,
    statistics_only: bool = False,
    log: Callable[[str], None] | None = None,
) -> Evaluation:
    """Score text files, a `held_out` token stream, and tasks.

    A task is an `EvalTask`, or the name of one in docs/reference/tasks.md, whose file is in the
    folder `task_data`. Texts are read in windows that start every `stride` tokens (default: the
    context length). Raises ValueError for files that are missing, damaged or empty, and for a
    stride larger than the context. With `statistics_only`, tasks have `protocol`, `results` and
    `statistics` only, without standard errors and other conditions.
    """
    log = log or (lambda line: None)
    eval_tasks = [
        each if isinstance(each, EvalTask) else load_tasks([each], (), folder=task_data)[0]
        for each in tasks
    ]
    evaluation = Evaluation()
    if files or held_out is not None:
        of = "each text" if files else "all of it, one document after the other,"
        evaluation.protocol["text"] = text_protocol(model, stride, of=of)
        log(evaluation.protocol["text"])
    if held_out is not None:
        documents = document_texts(held_out, model.tokenizer, chunk_tokens=held_out.n_tokens)
        evaluation.text["held-out split"] = _text_row(
            score_stream(model, held_out, stride=stride),
            (text for _, text in documents),
            stderr=bits_per_byte_error(model, held_out),
        )
    for file in files:
        evaluation.documents[file], facts = read_whole(file, text_field)
        texts = [document.text for document in evaluation.documents[file]]
        scores = score_each(model, texts, stride=stride)
        bits = np.array([(score.nats / math.log(2), score.bytes) for score in scores], np.float64)
        evaluation.statistics[file, "bits_per_byte"] = bits
        stderr = estimate("bits_per_byte", bits, seed=0).stderr  # over the documents
        evaluation.text[file] = _text_row(sum(scores, Score(0.0, 0, 0)), texts, stderr=stderr)
        if facts:
            evaluation.text[file]["reading"] = facts
    for name, row in evaluation.text.items():
        error = row["bits_per_byte_stderr"]
        error = "" if error is None else f" +- {error:.4f}"
        log(
            f"{name}: {row['bits_per_byte']:.4f}{error} bits/byte, perplexity "
            f"{row['perplexity']:,.2f} a token and {row['word_perplexity']:,.1f} a word, "
            f"{row['tokens']:,} tokens, {row['bytes']:,} bytes"
        )
        for label, fact in row.get("reading", {}).items():
            log(f"  {label:<9} " + fact.replace("\n", "\n" + " " * 12))
    for eval_task in eval_tasks:
        task = eval_task.task
        results = evaluate_task(model, task, eval_task.examples, stride=stride)
        evaluation.protocol[task.name] = task_protocol(model, eval_task, results)
        log(f"{task.name}: {evaluation.protocol[task.name]}")
        evaluation.results.append((eval_task, results))
        evaluation.statistics[task.name, task.metric] = results.statistics[task.metric]
        if not statistics_only:
            row = _task_row(model, eval_task, results, stride=stride, log=log)
            evaluation.tasks[task.name] = row
    return evaluation


def _text_row(text_score: Score, texts: Iterable[str], *, stderr: float | None) -> dict[str, Any]:
    n_words = sum(len(text.split()) for text in texts)
    return {
        **asdict(text_score),
        "words": n_words,
        "perplexity": text_score.perplexity,
        "word_perplexity": text_score.word_perplexity(n_words),
        "bits_per_byte": text_score.bits_per_byte,
        "bits_per_byte_stderr": stderr,
    }


def _task_row(
    model: Model,
    eval_task: EvalTask,
    results: TaskResults,
    *,
    stride: int | None,
    log: Callable[[str], None],
) -> dict[str, Any]:
    task = eval_task.task
    metrics = {
        metric: asdict(estimate(metric, statistics, seed=eval_task.seed))
        for metric, statistics in results.statistics.items()
    }
    row: dict[str, Any] = {
        "metric": task.metric,
        **metrics[task.metric],
        "examples": len(eval_task.examples),
        "metrics": metrics,
    }
    for metric, values in metrics.items():
        is_main = metric == task.metric
        line = f"  {'*' if is_main else ' '} {metric:<24}{values['value']:.4f}"
        if values["stderr"] is not None:
            line += f" +- {values['stderr']:.4f}"
        if is_main and values["detectable"] is not None:
            line += f"   smallest detectable difference of two models {values['detectable']:.4f}"
        elif is_main:
            line += "   too few different examples to tell two models apart"
        log(line)
    if task.wrong:
        row |= condition_metrics(model, eval_task, stride=stride)
        nats, p, baselines = row["nats_per_byte"], row["p"], row["baselines"]
        log(
            f"    nats/byte of the reference: {nats['task']:.4f} with the task; "
            f"{nats['wrong']:.4f} with {task.wrong} instead (p = {p['wrong']:.4f}); "
            f"{nats['none']:.4f} with none (p = {p['none']:.4f})\n"
            f"    {task.metric} of the input itself {baselines['copy']:.4f}, of its first sentence "
            f"{baselines['lead']:.4f}"
        )
        for example, record in list(zip(eval_task.examples, results.records, strict=True))[:3]:
            log(f"    {example.input}\n    -> {record['answer']}\n    ({record['references'][0]})")
    return row


def text_protocol(model: Model, stride: int | None, *, of: str = "each text") -> str:
    """How texts are scored, in one line. ValueError for a stride larger than the context."""
    context = model.decoder.config.window_tokens
    step = resolve_stride(stride, context)
    overlap = f"overlap by {context - step}" if step < context else "do not overlap"
    start = model.tokenizer.id_to_token(model.tokenizer.start_of_text)
    return (
        f"windows of {context} tokens that {overlap}, every token counted once, {of} from "
        f"{start} on, in {model.precision}"
    )


def task_protocol(model: Model, eval_task: EvalTask, results: TaskResults) -> str:
    """How a task was evaluated, in one line."""
    task, tokenizer = eval_task.task, model.tokenizer
    n_examples, n_shots = len(eval_task.examples), eval_task.n_shots
    examples = "1 example" if n_examples == 1 else f"{n_examples:,} examples"
    shots = f"{n_shots} shots of seed {eval_task.seed}" if n_shots else "no shots"
    has_start = tokenizer.add_bos or task.kind in ("pair", "text")
    start = tokenizer.id_to_token(tokenizer.start_of_text) if has_start else "nothing"
    after = f"{task.delimiter!r} after it"
    if task.kind == "answer":
        stops = " or ".join(repr(stop) for stop in task.stops)
        after = f"at most {task.max_tokens} tokens generated greedily, up to the first {stops}"
    protocol = (
        f"{task.kind}, {examples}, {shots}, {start} before a context, {after}, in {model.precision}"
    )
    if results.n_truncated:
        protocol += f", {results.n_truncated:,} of them truncated from the left"
    return protocol
