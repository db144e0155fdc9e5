"""Answer a task with a model: p(answer | input, task in words).

pretrain ask runs/multitask-1 --task translate-en-fr --input "Two dogs play in the snow."
"""

from __future__ import annotations

import argparse

from pretrain.cli.options import DEVICE, MODEL, option
from pretrain.cli.output import Output
from pretrain.evaluate.examples import prompt, promptable_tasks
from pretrain.evaluate.tasks import task_named
from pretrain.runner.open import load_model

OPTIONS = (
    MODEL,
    option("--task NAME", "translate-en-fr, answer, summarize, ...", required=True),
    option("--input TEXT", "the input of the task", required=True),
    DEVICE,
)


def run(args: argparse.Namespace, output: Output) -> None:
    task = task_named(args.task, promptable_tasks())
    context = prompt(task, args.input)

    from pretrain.evaluate.run_tasks import generate_answer

    model = load_model(args.model, device=args.device)
    answer, is_truncated = generate_answer(model, task, context)
    if is_truncated:
        output.log("the model reads only the end of this, which is longer than its context:")
    output.log(f"{context}{task.delimiter}{answer}")
    output.result({"task": task.name, "prompt": context, "answer": answer})
