"""What `evaluate`, `compare` and the tasks of `train` share: which texts and tasks are asked, and
how a model answers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pretrain.evaluate.task_files import TASKS_VARIABLE, EvalTask, load_tasks, read_texts

if TYPE_CHECKING:
    from pretrain.evaluate import Score
    from pretrain.evaluate.metrics import Array
    from pretrain.evaluate.run_tasks import TaskResults
    from pretrain.runner.open import LoadedModel

STARTS = {"model": None, "always": True, "never": False}
# What a text does not ask for, and what it is when it was not given.
_OF_TASKS = {
    "metric": None,
    "limit": None,
    "answers": None,
    "explain": None,
    "shots": 0,
    "start_of_text": "model",
}


def task_protocol(model: LoadedModel, eval_task: EvalTask, results: TaskResults) -> str:
    """How the task was evaluated, in one line."""
    task, tokenizer = eval_task.task, model.tokenizer
    n_examples = len(eval_task.examples)
    add_bos = tokenizer.add_bos or task.kind in ("pair", "text")
    start = tokenizer.id_to_token(tokenizer.start_of_text) if add_bos else "nothing"
    shots = (
        f"{eval_task.n_shots} shots of seed {eval_task.seed}" if eval_task.n_shots else "no shots"
    )
    cut = f", {results.n_cut:,} of them cut from the left" if results.n_cut else ""
    after = f"{task.delimiter!r} after it"
    if task.kind == "answer":
        stops = " or ".join(map(repr, task.stops))
        after = f"at most {task.max_tokens} tokens generated greedily, up to the first {stops}"
    return (
        f"{task.kind}, {n_examples:,} example{'' if n_examples == 1 else 's'}, {shots}, {start} "
        f"before a context, {after}, in {model.precision}{cut}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="texts to score, in any format that prepare reads"
    )
    parser.add_argument(
        "--text-field", metavar="F", help="field of a jsonl record that holds the text"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from one window to the next [the context: windows do not overlap]",
    )
    parser.add_argument(
        "--tasks", metavar="NAME,...", help="tasks of the table in docs/how-to/tasks.md"
    )
    parser.add_argument(
        "--task-data", metavar="DIR", help=f"folder with the tasks' files [${TASKS_VARIABLE}]"
    )
    parser.add_argument(
        "--task-file", nargs="+", metavar="FILE", help="your own, as docs/how-to/tasks.md says"
    )
    parser.add_argument("--metric", metavar="M", help="what the tasks are judged by [their own]")
    parser.add_argument(
        "--shots", type=int, default=0, metavar="K", help="solved examples before each [0]"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N examples of each [all]")
    parser.add_argument(
        "--seed", type=int, default=1, metavar="S", help="of shots and resampling [1]"
    )
    parser.add_argument(
        "--start-of-text",
        choices=STARTS,
        default="model",
        help="whether one stands before a context [model: as the model's texts begin]",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")


def read_eval_tasks(arguments: argparse.Namespace) -> list[EvalTask]:
    """Read and check the requested tasks, before a model is loaded. ValueError for what is missing
    or does not go together."""
    from pretrain.corpus import list_files

    for name in arguments.text or []:
        list_files(name)  # reports a wrong path at once
    idle = [name for name, usual in _OF_TASKS.items() if getattr(arguments, name, usual) != usual]
    if idle and not (arguments.tasks or arguments.task_file):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"{options} is for tasks; give --tasks or --task-file with it")
    for option, least in (("stride", 1), ("limit", 1), ("shots", 0), ("seed", 0)):
        given = getattr(arguments, option)
        if given is not None and given < least:
            raise ValueError(f"--{option} is {given}; it must be at least {least}")
    names = [name.strip() for name in (arguments.tasks or "").split(",") if name.strip()]
    if arguments.tasks is not None and not names:
        raise ValueError("--tasks names no task")
    return load_tasks(
        dict.fromkeys(names),
        dict.fromkeys(arguments.task_file or []),
        folder=arguments.task_data,
        metric=arguments.metric,
        limit=arguments.limit,
        n_shots=arguments.shots,
        seed=arguments.seed,
    )


def open_scored(name: str, arguments: argparse.Namespace) -> LoadedModel:
    """The model, beginning contexts as was asked for."""
    from pretrain.runner.open import load_model

    model = load_model(name, device=arguments.device)
    begins = STARTS[arguments.start_of_text]
    if begins is not None:
        model.tokenizer.add_bos = begins
    return model


def task_results(model: LoadedModel, asked: EvalTask, stride: int | None) -> TaskResults:
    from pretrain.evaluate import evaluate_task

    return evaluate_task(
        model.decoder,
        model.tokenizer,
        asked.task,
        asked.examples,
        world=model.world,
        precision=model.precision,
        stride=stride,
    )


def conditions_of(model: LoadedModel, asked: EvalTask, stride: int | None) -> dict[str, Any]:
    """Nats a byte of the references with the task, with another and with none; how likely chance
    makes such differences; and the metric of answers that need no model."""
    from pretrain.evaluate import conditions
    from pretrain.evaluate.bootstrap import compare
    from pretrain.evaluate.metrics import value

    found = conditions.reference_nats(
        model.decoder,
        model.tokenizer,
        asked.task,
        asked.examples,
        world=model.world,
        precision=model.precision,
        stride=stride,
    )
    metric, without = asked.task.metric, conditions.baselines(asked.task.metric, asked.examples)
    return {
        conditions.METRIC: {n: float(value(conditions.METRIC, r.sum(0))) for n, r in found.items()},
        "p": {
            name: compare(conditions.METRIC, found["task"], rows, seed=asked.seed).p
            for name, rows in found.items()
            if name != "task"
        },
        "baselines": {n: float(value(metric, rows.sum(0))) for n, rows in without.items()},
    }


def score_documents(
    model: LoadedModel, file: str, arguments: argparse.Namespace
) -> tuple[list[str], list[Score], str]:
    """The texts of a file, what the model makes of each, and what was passed over, in words."""
    from pretrain.evaluate import score_each
    from pretrain.model import LMLoss

    texts, passed_over = read_texts(file, arguments.text_field)
    scores = score_each(
        LMLoss(model.decoder),
        model.tokenizer,
        texts,
        world=model.world,
        precision=model.precision,
        stride=arguments.stride,
    )
    return texts, scores, passed_over


def text_protocol(model: LoadedModel, stride: int | None, *, of: str = "each text") -> str:
    """How texts are scored, in a line. ValueError for a stride that does not fit the context."""
    from pretrain.data.batches import resolve_stride

    context = model.decoder.config.window_tokens
    step = resolve_stride(stride, context)
    overlap = f"overlap by {context - step}" if step < context else "do not overlap"
    start = model.tokenizer.id_to_token(model.tokenizer.start_of_text)
    return (
        f"windows of {context} tokens that {overlap}, every token counted once, {of} from "
        f"{start} on, in {model.precision}"
    )


def estimates(statistics: Mapping[str, Array], *, seed: int) -> dict[str, dict[str, Any]]:
    """Value, standard error and smallest difference of each metric."""
    from dataclasses import asdict

    from pretrain.evaluate.bootstrap import estimate

    return {name: asdict(estimate(name, rows, seed=seed)) for name, rows in statistics.items()}
