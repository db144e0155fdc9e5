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
from pretrain.cli.output import Output
from pretrain.runner.open import MODEL_HELP

if TYPE_CHECKING:
    from pretrain.evaluate import EvalTask
    from pretrain.evaluate.metrics import Array


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help=f"two or more; the others minus the first; {MODEL_HELP}",
    )
    scoring.add_arguments(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    names: list[str] = list(dict.fromkeys(arguments.models))
    if len(names) < 2:
        raise ValueError(f"{' '.join(arguments.models)} is one model; compare needs two or more")
    if not (arguments.text or arguments.tasks or arguments.task_file):
        raise ValueError("compare needs what to ask: --text FILE, --tasks NAME or --task-file FILE")
    asked = scoring.read_eval_tasks(arguments)
    for name in names:  # a model that cannot be opened or read so is said before one is asked
        scoring.text_protocol(scoring.open_scored(name, arguments), arguments.stride)
    found: dict[str, dict[tuple[str, str], Array]] = {}
    protocol: dict[str, dict[str, str]] = {}
    for name in names:
        output.say(f"{name} ...")
        found[name], protocol[name] = _statistics(name, asked, arguments)
        for said in protocol[name].values():
            output.say(f"  {said}")
    rows = [
        _row(what, (names[0], found[names[0]][what]), (name, found[name][what]), arguments.seed)
        for name in names[1:]
        for what in found[names[0]]
    ]
    for row in rows:
        output.say(_line(row))
    output.result({"models": names, "comparisons": rows, "protocol": protocol})
    return 0


def _statistics(
    name: str, asked: list[EvalTask], arguments: argparse.Namespace
) -> tuple[dict[tuple[str, str], Array], dict[str, str]]:
    """Of one model: statistics by what was asked and its metric, and how it was asked."""
    import numpy as np

    model = scoring.open_scored(name, arguments)
    found: dict[tuple[str, str], Array] = {}
    protocol: dict[str, str] = {}
    for text in arguments.text or []:
        protocol["text"] = scoring.text_protocol(model, arguments.stride)
        _, scores, passed_over = scoring.score_documents(model, text, arguments)
        if passed_over:
            protocol[text] = f"{text}: {passed_over}"
        bits = [(score.nats / math.log(2), score.bytes) for score in scores]
        found[text, "bits_per_byte"] = np.array(bits, np.float64)
    for each in asked:
        results = scoring.task_results(model, each, arguments.stride)
        protocol[each.task.name] = (
            f"{each.task.name}: {scoring.task_protocol(model, each, results)}"
        )
        found[each.task.name, each.task.metric] = results.statistics[each.task.metric]
    return found, protocol


def _row(
    what: tuple[str, str], first: tuple[str, Array], second: tuple[str, Array], seed: int
) -> dict[str, Any]:
    from pretrain.evaluate.bootstrap import compare
    from pretrain.evaluate.metrics import value

    on, metric = what
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
    said = (
        f"{row['on']}, {row['metric']}: {row['second']} {row['second_value']:.4f} - {row['first']} "
        f"{row['first_value']:.4f} = {row['difference']:+.4f}"
    )
    if row["p"] is None:
        why = "one document or example is too few" if row["examples"] == 1 else "it is not finite"
        return f"{said}; {why} for an interval"
    seen = f"; from {row['detectable']:.4f} on a difference is seen" if row["detectable"] else ""
    return (
        f"{said}, 95 % interval {row['low']:+.4f} to {row['high']:+.4f}, p = {row['p']:.4f}, over "
        f"{row['examples']:,} pairs{seen}"
    )
