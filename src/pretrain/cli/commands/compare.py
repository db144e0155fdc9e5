"""Compare models on the same texts or tasks: the paired difference, its interval and its p-value.

pretrain compare RUN OTHER --text a.jsonl           bits per byte, over the documents of the texts
pretrain compare RUN OTHER --tasks piqa --task-data DIR        over the examples of tasks
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pretrain.cli import scoring
from pretrain.cli.options import Option
from pretrain.cli.output import Output
from pretrain.runner.open import MODEL_HELP

if TYPE_CHECKING:
    from pretrain.evaluate.metrics import Array
    from pretrain.evaluate.task_files import EvalTask
    from pretrain.runner.open import LoadedModel

OPTIONS = (
    Option("MODEL", f"two or more; the others minus the first; {MODEL_HELP}", nargs="+"),
    *scoring.OPTIONS,
)


def run(args: argparse.Namespace, output: Output) -> None:
    names: list[str] = list(dict.fromkeys(args.model))
    if len(names) < 2:
        raise ValueError(f"{' '.join(args.model)} is one model; compare needs two or more")
    if not (args.text or args.tasks or args.task_file):
        raise ValueError(
            "compare needs a text or a task: --text FILE, --tasks NAME or --task-file FILE"
        )
    eval_tasks = scoring.read_eval_tasks(args)

    from pretrain.evaluate.evaluation import text_protocol

    for name in names:  # every model must open before the first one is evaluated
        text_protocol(_open(name, args), args.stride)
    statistics: dict[str, dict[tuple[str, str], Array]] = {}
    protocol: dict[str, dict[str, str]] = {}
    for name in names:
        output.log(f"{name} ...")
        statistics[name], protocol[name] = _statistics(name, eval_tasks, args)
        for line in protocol[name].values():
            output.log(f"  {line}")
    first = names[0]
    rows = [
        _row(key, (first, statistics[first][key]), (name, statistics[name][key]), args.seed)
        for name in names[1:]
        for key in statistics[first]
    ]
    for row in rows:
        output.log(_line(row))
    output.result({"models": names, "comparisons": rows, "protocol": protocol})


def _open(name: str, args: argparse.Namespace) -> LoadedModel:
    return scoring.open_scored(name, device=args.device, start_of_text=args.start_of_text)


def _statistics(
    name: str, eval_tasks: list[EvalTask], args: argparse.Namespace
) -> tuple[dict[tuple[str, str], Array], dict[str, str]]:
    """The statistics of one model, by text or task and metric, and how it was evaluated."""
    import numpy as np

    from pretrain.evaluate.evaluation import task_protocol, text_protocol
    from pretrain.evaluate.loss import score_each
    from pretrain.evaluate.run_tasks import evaluate_task
    from pretrain.evaluate.task_files import read_texts

    model = _open(name, args)
    statistics: dict[tuple[str, str], Array] = {}
    protocol: dict[str, str] = {}
    for file in args.text or []:
        protocol["text"] = text_protocol(model, args.stride)
        texts, note = read_texts(file, args.text_field)
        scores = score_each(model, texts, stride=args.stride)
        if note:
            protocol[file] = f"{file}: {note}"
        bits = [(score.nats / math.log(2), score.bytes) for score in scores]
        statistics[file, "bits_per_byte"] = np.array(bits, np.float64)
    for eval_task in eval_tasks:
        task = eval_task.task
        results = evaluate_task(model, task, eval_task.examples, stride=args.stride)
        line = task_protocol(model, eval_task, results)
        protocol[task.name] = f"{task.name}: {line}"
        statistics[task.name, task.metric] = results.statistics[task.metric]
    return statistics, protocol


def _row(
    key: tuple[str, str], first: tuple[str, Array], second: tuple[str, Array], seed: int
) -> dict[str, Any]:
    from pretrain.evaluate.bootstrap import compare
    from pretrain.evaluate.metrics import value

    on, metric = key
    difference = compare(metric, second[1], first[1], seed=seed)
    return {
        "on": on,
        "metric": metric,
        "examples": len(first[1]),
        "first": first[0],
        "second": second[0],
        "first_value": float(value(metric, first[1].sum(0))),
        "second_value": float(value(metric, second[1].sum(0))),
        **asdict(difference),
    }


def _line(row: dict[str, Any]) -> str:
    line = (
        f"{row['on']}, {row['metric']}: {row['second']} {row['second_value']:.4f} - {row['first']} "
        f"{row['first_value']:.4f} = {row['difference']:+.4f}"
    )
    if row["p"] is None:
        why = "one document or example is too few" if row["examples"] == 1 else "it is not finite"
        return f"{line}; {why} for an interval"
    line += (
        f", 95 % interval {row['low']:+.4f} to {row['high']:+.4f}, p = {row['p']:.4f}, over "
        f"{row['examples']:,} pairs"
    )
    if row["detectable"]:
        line += f"; smallest detectable difference {row['detectable']:.4f}"
    return line
