"""What is followed through training: the fields of the section `evaluate` of a config.

Names of tasks and files come in; a name that is not in the table, or a count below 1, is a
ValueError before anything is read. None of it changes a bit of what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.evaluate.tasks import task_named


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """The section `evaluate`."""

    tasks: tuple[str, ...] = ()
    """tasks of the table in docs/how-to/tasks.md that are asked while training goes on"""
    task_data: str | None = None
    """folder with the files of those tasks; empty: the environment's PRETRAIN_TASKS"""
    task_files: tuple[str, ...] = ()
    """tasks of your own, in the form of docs/how-to/tasks.md"""
    texts: tuple[str, ...] = ()
    """files of text whose bits per byte are followed"""
    examples: int = 200
    """examples of each task, its first ones; of a text so many passages of at most 2,000
    characters"""
    every: int | None = None
    """steps between; empty: a multiple of train.evaluate_every that costs less than 3 % of the
    run's time, measured once at the start"""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        for name in self.tasks:
            try:
                task_named(name)
            except ValueError as error:
                yield "tasks", f"evaluate.tasks: {error}"
        for field in ("examples", "every"):
            value = getattr(self, field)
            if value is not None and not 1 <= value <= 10**10:
                yield field, f"evaluate.{field} is {value}; it must be at least 1, at most 10^10"
