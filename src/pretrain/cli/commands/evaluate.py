"""Score a model on text, every token counted once, and on tasks.

pretrain evaluate RUN                      the run's own held-out text, whole
pretrain evaluate RUN --text a.txt b.txt   your own files, each by itself
pretrain evaluate RUN --stride 64          windows that overlap: more context for each token
pretrain evaluate RUN --text a.txt --heat-map a.html         which words have high nats
pretrain evaluate RUN --tasks lambada,piqa --task-data DIR   tasks of the papers
pretrain evaluate RUN --task-file mine.jsonl --shots 2       your own: docs/how-to/tasks.md
pretrain evaluate RUN --overlap            overlap with its training text, also in its report
"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from pretrain.cli import scoring
from pretrain.cli.options import MODEL, option
from pretrain.cli.output import Output, require_writable, write_output
from pretrain.fileio import nan_to_null
from pretrain.run.directory import OVERLAP, write_json
from pretrain.runner.open import LoadedModel
from pretrain.runner.text import cache_folder, text_of_run

if TYPE_CHECKING:
    from pretrain.evaluate.evaluation import Evaluation

OPTIONS = (
    MODEL,
    *scoring.OPTIONS,
    option("--answers FILE", "write the answers, one JSON line for each example"),
    option("--heat-map FILE", "write the texts as HTML, tokens coloured by their nats"),
    option(
        "--overlap",
        "also measure the share of these texts, and of generated text, that the training text "
        "contains",
    ),
)


def run(args: argparse.Namespace, output: Output) -> None:
    eval_tasks = scoring.read_eval_tasks(args)
    _check_files(args)
    model = scoring.open_scored(args.model, device=args.device, start_of_text=args.start_of_text)

    from pretrain.evaluate.evaluation import evaluate

    needs_held_out = args.text is None and not eval_tasks
    if needs_held_out or args.overlap:
        data = text_of_run(model, output.log)
    output.log(f"{model.path}:")
    evaluation = evaluate(
        model,
        args.text or (),
        tasks=eval_tasks,
        held_out=data.split("val") if needs_held_out else None,
        text_field=args.text_field,
        stride=args.stride,
        log=output.log,
    )
    if args.answers:
        lines = [
            json.dumps(nan_to_null({"task": eval_task.task.name, **record})) + "\n"
            for eval_task, results in evaluation.results
            for record in results.records
        ]
        write_output(args.answers, "".join(lines))
    if args.heat_map:
        _draw_heat_map(model, evaluation, args, output)
    content = evaluation.to_json()
    if args.overlap:
        from pretrain.evaluate.overlap import row_message, training_overlap
        from pretrain.report.page import write_report
        from pretrain.report.run import read_run_files

        run_folder = model.run_folder
        overlap: dict[str, Any] = {"checkpoint": model.path.relative_to(run_folder).as_posix()}
        overlap |= training_overlap(
            model,
            data,
            documents=evaluation.documents,
            results=evaluation.results,
            samples=[
                str(sample.get("text")).removeprefix(str(sample.get("prompt") or ""))
                for sample in read_run_files(run_folder).samples
            ],
            seed=args.seed,
            cache=cache_folder() / "overlap",
            log=output.log,
        )
        output.log("share of their sequences of 8 words that the training text contains:")
        for name, row in {**overlap["sets"], **overlap["writing"]}.items():
            output.log(f"  {name}: {row_message(row)}")
        write_json(run_folder / OVERLAP, overlap)
        output.log(f"written to {run_folder / OVERLAP} and {write_report(run_folder)}")
        content["overlap"] = overlap
    output.result(content)


def _check_files(args: argparse.Namespace) -> None:
    """Reject output files that cannot be written, or that are named twice."""
    if args.heat_map and args.text is None:
        raise ValueError("--heat-map is for texts; give --text with it")
    outputs = [name for name in (args.answers, args.heat_map) if name]
    names = [*outputs, *(args.text or ()), *(args.task_file or ())]
    paths = [os.path.realpath(name) for name in names]
    for name in outputs:
        if paths.count(os.path.realpath(name)) > 1:
            raise ValueError(
                f"{name} is also an input or another output, and would be overwritten; use "
                "another name"
            )
        require_writable(name)


def _draw_heat_map(
    model: LoadedModel, evaluation: Evaluation, args: argparse.Namespace, output: Output
) -> None:
    from pretrain.evaluate.token_stats import annotated_documents
    from pretrain.report.html import heat_map_page

    annotated, n_drawn = annotated_documents(model, evaluation.documents, stride=args.stride)
    n_tokens = sum(row["tokens"] for row in evaluation.text.values())
    shown = f"all {n_drawn:,} tokens"
    if n_drawn < n_tokens:
        shown = f"the first {n_drawn:,} of {n_tokens:,} tokens; the other ones are left out"
    note = (
        "The redder a token, the less the model expected it. Point at a token to see its nats, "
        f"probability and rank. Shown: {shown}."
    )
    write_output(args.heat_map, heat_map_page(annotated, model=str(model.path), note=note))
    output.log(f"{args.heat_map}: {shown}, coloured by their nats")
