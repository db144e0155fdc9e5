"""The section `evaluate` of a config: tasks and texts that are evaluated during training.

Nothing here changes what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pretrain.evaluate.tasks import task_named
from pretrain.validation import Checked, FieldError, Range


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig(Checked):
    """The section `evaluate`."""

    section = "evaluate"

    tasks: tuple[str, ...] = ()
    """tasks of the table in docs/how-to/tasks.md to evaluate during training"""
    task_data: str | None = None
    """folder with the files of those tasks; empty: the environment variable PRETRAIN_TASKS"""
    task_files: tuple[str, ...] = ()
    """files with tasks of your own, in the format of docs/how-to/tasks.md"""
    texts: tuple[str, ...] = ()
    """files of text whose bits per byte are measured during training"""
    examples: Annotated[int, Range(1, 10**10)] = 200
    """number of examples of each task, from its start; for a text, number of chunks of at most
    2,000 characters"""
    every: Annotated[int | None, Range(1, 10**10)] = None
    """steps between these evaluations; empty: the multiple of train.evaluate_every that costs less
    than 3 % of the run's time, measured once at the start"""

    def conflicts(self) -> Iterator[FieldError]:
        for name in self.tasks:
            try:
                task_named(name)
            except ValueError as error:
                yield "tasks", f"evaluate.tasks: {error}"
