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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli import scoring
from pretrain.cli.options import MODEL, Option
from pretrain.cli.output import Output
from pretrain.fileio import nan_to_null
from pretrain.run.directory import OVERLAP, write_json
from pretrain.runner.text import cache_folder, text_of_run

if TYPE_CHECKING:
    from pretrain.data.format import PreparedData
    from pretrain.evaluate.evaluation import Evaluation
    from pretrain.runner.open import LoadedModel

# A page of more tokens is too slow to look at.
MAX_HEAT_MAP_TOKENS = 20_000

OPTIONS = (
    MODEL,
    *scoring.OPTIONS,
    Option("--answers FILE", "write the answers, one JSON line for each example"),
    Option("--heat-map FILE", "write the texts as HTML, tokens coloured by their nats"),
    Option(
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

    training_text = None
    if args.overlap:
        training_text = _text_of(model, "so there is no training text for --overlap to read")
    held_out = None
    if args.text is None and not eval_tasks:
        held_out = _text_of(model, "so it has no held-out text; score files with --text")
    output.log(f"{model.path}:")
    evaluation = evaluate(
        model,
        args.text or (),
        tasks=eval_tasks,
        held_out=None if held_out is None else held_out.split("val"),
        text_field=args.text_field,
        stride=args.stride,
        log=output.log,
    )
    if args.answers:
        _write_answers(Path(args.answers), evaluation)
    if args.heat_map:
        _draw_heat_map(model, args, output)
    content = evaluation.to_json()
    if training_text is not None:
        content["overlap"] = _overlap(model, training_text, evaluation, args, output)
    output.result(content)


def _check_files(args: argparse.Namespace) -> None:
    """Reject output files that cannot be written, or that are also input."""
    if args.heat_map and args.text is None:
        raise ValueError("--heat-map is for texts; give --text with it")
    inputs = [*(args.text or ()), *(args.task_file or ())]
    real_inputs = {os.path.realpath(name) for name in inputs}
    for name in filter(None, (args.answers, args.heat_map)):
        if os.path.realpath(name) in real_inputs:
            raise ValueError(f"{name} is also an input, and would be overwritten; use another name")
        open(name, "a").close()


def _text_of(model: LoadedModel, otherwise: str) -> PreparedData:
    """The text that a model was trained on. ValueError if it was not trained here."""
    fingerprint = None if model.checkpoint is None else model.checkpoint.state.get("fingerprint")
    if fingerprint is None:
        raise ValueError(f"{model.path} was not trained here, {otherwise}")
    return text_of_run(model.config, fingerprint)


def _write_answers(path: Path, evaluation: Evaluation) -> None:
    lines = [
        json.dumps(nan_to_null({"task": eval_task.task.name, **record})) + "\n"
        for eval_task, results in evaluation.results
        for record in results.records
    ]
    path.write_text("".join(lines), encoding="utf-8")


def _draw_heat_map(model: LoadedModel, args: argparse.Namespace, output: Output) -> None:
    from pretrain.corpus.reading import read_documents
    from pretrain.evaluate.token_stats import annotated_documents
    from pretrain.report.html import heat_map_page

    documents = (
        (file if number == 1 else f"{file}, document {number:,}", document.text)
        for file in args.text
        for number, document in enumerate(read_documents(file, text_field=args.text_field), start=1)
    )
    annotated, n_tokens = annotated_documents(
        model, documents, max_tokens=MAX_HEAT_MAP_TOKENS, stride=args.stride
    )
    note = "The redder a token, the less the model expected it after the text before it."
    if n_tokens == MAX_HEAT_MAP_TOKENS:
        note += f" Shown are the first {MAX_HEAT_MAP_TOKENS:,} tokens."
    page = heat_map_page(annotated, model=str(model.path), note=note)
    Path(args.heat_map).write_text(page, encoding="utf-8", newline="\n")
    output.log(f"{args.heat_map}: {n_tokens:,} tokens, by their nats")


def _overlap(
    model: LoadedModel,
    data: PreparedData,
    evaluation: Evaluation,
    args: argparse.Namespace,
    output: Output,
) -> dict[str, Any]:
    """Measure the overlap with the training text, and write it to the run and its report."""
    from pretrain.evaluate import overlap
    from pretrain.report.page import write_report
    from pretrain.report.run import read_run_files

    run_folder = model.path.parent.parent
    corpus = overlap.training_filter(data, cache_folder() / "overlap", log=output.log)
    sets = overlap.evaluation_set_rows(
        data,
        corpus,
        files=args.text or (),
        text_field=args.text_field,
        results=evaluation.results,
    )
    output.log("continuing held-out text ...")
    generated = overlap.generated_text_rows(
        model,
        data,
        corpus,
        samples=[
            str(sample.get("text")).removeprefix(str(sample.get("prompt") or ""))
            for sample in read_run_files(run_folder).samples
        ],
        seed=args.seed,
    )
    train = data.split("train")
    content: dict[str, Any] = {
        "checkpoint": model.path.relative_to(run_folder).as_posix(),
        "training_text": {"documents": train.n_documents, "bytes": train.n_bytes},
        "filter": {"bytes": corpus.n_bytes, "false_positives": corpus.false_positives},
        "sets": sets,
        "writing": generated,
    }
    output.log("8 words in a row that are in the training text too:")
    for name, row in {**sets, **generated}.items():
        output.log(f"  {name}: {overlap.row_message(row)}")
    write_json(run_folder / OVERLAP, nan_to_null(content))
    output.log(f"written to {run_folder / OVERLAP} and {write_report(run_folder)}")
    return content
