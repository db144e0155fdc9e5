"""The options that `evaluate` and `compare` share: texts, tasks, and how to score them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pretrain.cli.options import add_device, add_text_field
from pretrain.cli.options import names as split_names
from pretrain.evaluate.task_files import TASKS_VARIABLE, EvalTask, load_tasks

if TYPE_CHECKING:
    from pretrain.runner.open import LoadedModel

STARTS = {"model": None, "always": True, "never": False}
# Options that only tasks have, with their defaults.
_OF_TASKS = {
    "metric": None,
    "limit": None,
    "answers": None,
    "shots": 0,
    "start_of_text": "model",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="texts to score, in any format that prepare reads"
    )
    add_text_field(parser)
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
        "--task-file", nargs="+", metavar="FILE", help="your own tasks: docs/how-to/tasks.md"
    )
    parser.add_argument("--metric", metavar="M", help="metric of the tasks [each task's own]")
    parser.add_argument(
        "--shots", type=int, default=0, metavar="K", help="solved examples before each question [0]"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="first N examples of each task [all]"
    )
    parser.add_argument(
        "--seed", type=int, default=1, metavar="S", help="seed of shots and of resampling [1]"
    )
    parser.add_argument(
        "--start-of-text",
        choices=STARTS,
        default="model",
        help="put a start-of-text token before a context [model: its own setting]",
    )
    add_device(parser)


def read_eval_tasks(args: argparse.Namespace) -> list[EvalTask]:
    """Read and check the requested tasks, before a model is loaded. ValueError for what is missing
    or does not go together."""
    from pretrain.corpus.files import list_files

    for name in args.text or []:
        list_files(name)  # reports a wrong path at once
    idle = [name for name, usual in _OF_TASKS.items() if getattr(args, name, usual) != usual]
    if idle and not (args.tasks or args.task_file):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"{options} is for tasks; give --tasks or --task-file with it")
    for option, least in (("stride", 1), ("limit", 1), ("shots", 0), ("seed", 0)):
        given = getattr(args, option)
        if given is not None and given < least:
            raise ValueError(f"--{option} is {given}; it must be at least {least}")
    names = split_names(args.tasks)
    if args.tasks is not None and not names:
        raise ValueError("--tasks names no task")
    return load_tasks(
        dict.fromkeys(names),
        dict.fromkeys(args.task_file or []),
        folder=args.task_data,
        metric=args.metric,
        limit=args.limit,
        n_shots=args.shots,
        seed=args.seed,
    )


def open_scored(name: str, *, device: str, start_of_text: str = "model") -> LoadedModel:
    """Load a model, with or without a start-of-text token before contexts as requested."""
    from pretrain.runner.open import load_model

    model = load_model(name, device=device)
    add_bos = STARTS[start_of_text]
    if add_bos is not None:
        model.tokenizer.add_bos = add_bos
    return model
