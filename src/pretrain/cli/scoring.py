"""The options that `evaluate` and `compare` share: texts, tasks, and how to score them."""

from __future__ import annotations

import argparse

from pretrain.cli.options import DEVICE, TEXT_FIELD, names, option
from pretrain.corpus.files import list_files
from pretrain.evaluate.task_files import TASKS_VARIABLE, EvalTask, load_tasks
from pretrain.runner.open import LoadedModel, load_model

STARTS = {"model": None, "always": True, "never": False}
# Options that only tasks have.
_OF_TASKS = ("metric", "limit", "answers", "shots", "start_of_text")
OPTIONS = (
    option("--text FILE", "texts to score, in any format that prepare reads", nargs="+"),
    TEXT_FIELD,
    option(
        "--stride N",
        "tokens from one window to the next [the context: windows do not overlap]",
        type=int,
        least=1,
    ),
    option("--tasks NAME,...", "tasks of the table in docs/how-to/tasks.md"),
    option("--task-data DIR", f"folder with the tasks' files [${TASKS_VARIABLE}]"),
    option("--task-file FILE", "your own tasks: docs/how-to/tasks.md", nargs="+"),
    option("--metric M", "metric of the tasks [each task's own]"),
    option("--shots K", "solved examples before each question", 0, least=0),
    option("--limit N", "first N examples of each task [all]", type=int, least=1),
    option("--seed S", "seed of shots and of resampling", 1, least=0),
    option(
        "--start-of-text",
        "put a start-of-text token before a context [model: its own setting]",
        "model",
        choices=tuple(STARTS),
    ),
    DEVICE,
)


def read_eval_tasks(args: argparse.Namespace) -> list[EvalTask]:
    """Read and check the requested tasks, before a model is loaded. ValueError for what is missing
    or does not go together."""
    for name in args.text or []:
        list_files(name)  # reports a wrong path at once
    unused = (None, 0, "model")
    idle = [name for name in _OF_TASKS if getattr(args, name, None) not in unused]
    if idle and not (args.tasks or args.task_file):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"only tasks use {options}; add --tasks or --task-file")
    task_names = names(args.tasks)
    if args.tasks is not None and not task_names:
        raise ValueError("--tasks is empty; it must be names of tasks, such as piqa,lambada")
    return load_tasks(
        dict.fromkeys(task_names),
        dict.fromkeys(args.task_file or []),
        folder=args.task_data,
        metric=args.metric,
        limit=args.limit,
        n_shots=args.shots,
        seed=args.seed,
    )


def open_scored(name: str, *, device: str, start_of_text: str = "model") -> LoadedModel:
    """Load a model, with or without a start-of-text token before contexts as requested."""
    model = load_model(name, device=device)
    add_bos = STARTS[start_of_text]
    if add_bos is not None:
        model.tokenizer.add_bos = add_bos
    return model
