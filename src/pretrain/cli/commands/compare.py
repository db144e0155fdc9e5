"""Compare models on the same texts or tasks: the paired difference, its interval and its p-value.

pretrain compare RUN OTHER --text a.jsonl           bits per byte, over the documents of the texts
pretrain compare RUN OTHER --tasks piqa --task-data DIR        over the examples of tasks
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from typing import Any

from pretrain.cli import scoring
from pretrain.cli.options import option
from pretrain.cli.output import Output
from pretrain.runner.open import MODEL_HELP

OPTIONS = (
    option("MODEL", f"two or more; the others minus the first; {MODEL_HELP}", nargs="+"),
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

    from pretrain.evaluate.bootstrap import compare
    from pretrain.evaluate.evaluation import evaluate, text_protocol
    from pretrain.evaluate.metrics import value

    open_model = partial(scoring.open_scored, device=args.device, start_of_text=args.start_of_text)
    for name in names:  # every model must open before the first one is evaluated
        text_protocol(open_model(name), args.stride)
    evaluations = {}
    for name in names:
        output.log(f"{name} ...")
        evaluations[name] = evaluate(
            open_model(name),
            args.text or (),
            tasks=eval_tasks,
            text_field=args.text_field,
            stride=args.stride,
            statistics_only=True,
            log=output.log,
        )
        evaluations[name].documents.clear()  # the texts of one model at a time
    protocol = {}
    for name, evaluation in evaluations.items():
        lines = dict(evaluation.protocol)
        for file, row in evaluation.text.items():
            if facts := row.get("reading"):
                lines[file] = "; ".join(f"{label} {fact}" for label, fact in facts.items())
        protocol[name] = {
            key: line if key == "text" else f"{key}: {line}" for key, line in lines.items()
        }
    first, *others = names
    rows: list[dict[str, Any]] = []
    for second in others:
        for (on, metric), statistics in evaluations[first].statistics.items():
            of_second = evaluations[second].statistics[on, metric]
            row = {
                "on": on,
                "metric": metric,
                "examples": len(statistics),
                "first": first,
                "second": second,
                "first_value": float(value(metric, statistics.sum(0))),
                "second_value": float(value(metric, of_second.sum(0))),
                **asdict(compare(metric, of_second, statistics, seed=args.seed)),
            }
            output.log(_line(row))
            rows.append(row)
    output.result({"models": names, "comparisons": rows, "protocol": protocol})


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
