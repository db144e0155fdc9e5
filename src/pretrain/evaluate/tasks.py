"""Tasks: what each asks, which file it needs, and by which number a model is judged.

The table is tasks.toml, one section a task; a file in the documented form (docs/how-to/tasks.md) is
a task too, whose kind is told by the fields of its records. An unknown name is a
ValueError with the nearest names.
"""

from __future__ import annotations

import difflib
import importlib.resources
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

Kind = Literal["choice", "cloze", "schema", "answer", "pair", "text"]
# Of each kind all metrics there are, its own first.
METRICS: dict[Kind, tuple[str, ...]] = {
    "choice": (
        "accuracy",
        "accuracy_per_token",
        "accuracy_per_character",
        "accuracy_per_byte",
        "accuracy_unconditional",
    ),
    "cloze": ("accuracy", "perplexity", "bits_per_byte"),
    "schema": ("accuracy",),
    "answer": ("f1", "exact_match", "final_answer", "rouge1", "rouge2", "rougeL", "bleu", "chrf"),
    "pair": ("accuracy",),
    "text": ("bits_per_byte", "word_perplexity", "perplexity"),
}
# Continuations that stand for themselves have no delimiter before them.
_WITHOUT_DELIMITER: tuple[Kind, ...] = ("pair", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task's definition."""

    name: str
    kind: Kind
    metric: str
    """The number that the task is known by; all of its kind are reported."""
    file: str
    """Name of the file, in whatever folder the user keeps it."""
    sha256: str | None = None
    """Hash of the file; None where everybody makes his own in the documented form."""
    form: Literal["jsonl", "six lines", "squad", "text", "lines"] = "jsonl"
    context: str = ""
    """Template over a record's fields; empty: the record's own context, query or question."""
    choices: tuple[str, ...] = ()
    """Templates; none: the record's own choices."""
    gold: str = "gold"
    """The field that tells the right choice: its number, or one of `labels`."""
    labels: tuple[str, ...] = ()
    delimiter: str = " "
    """Stands between a context and what follows it."""
    unconditional: str = ""
    """Context of the p(choice) that p(choice | context) is divided by; empty: a start-of-text."""
    description: str = ""
    """Stands before all shots and the context."""
    between: str = "\n\n"
    """Stands between shots."""
    stops: tuple[str, ...] = ("\n",)
    """An answer ends before the first of them."""
    max_tokens: int = 32
    answer_after: str = ""
    """Only what follows the last of it is compared, of an answer and of its references."""
    wrong: str = ""
    """Another task that could be asked of the same inputs, to show what naming the task does."""
    papers: tuple[str, ...] = ()
    source: str = ""


@cache
def tasks() -> dict[str, Task]:
    """The table, by name."""
    text = importlib.resources.files("pretrain.evaluate").joinpath("tasks.toml").read_text("utf-8")
    return {name: _task(name, fields) for name, fields in tomllib.loads(text).items()}


def _task(name: str, fields: Mapping[str, Any]) -> Task:
    kind: Kind = fields["kind"]
    usual = {"metric": METRICS[kind][0]}
    if kind in _WITHOUT_DELIMITER:
        usual["delimiter"] = ""
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    task = Task(name=name, **{**usual, **fields, **lists})
    assert task.metric in METRICS[kind], name
    return task


def task_of_kind(kind: Kind, file: str) -> Task:
    """The task that a file in the documented form is, named after it."""
    return _task(file, {"kind": kind, "file": file})


def with_metric(task: Task, metric: str) -> Task:
    """The task judged by another number of its kind. ValueError for one of another kind."""
    if metric not in METRICS[task.kind]:
        raise ValueError(
            f"metric {metric} does not go with {task.name}, which is of the kind {task.kind}; "
            f"legal: {', '.join(METRICS[task.kind])}"
        )
    return replace(task, metric=metric)


def task_named(name: str) -> Task:
    """A task of the table. ValueError with the nearest names for another."""
    table = tasks()
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3)
    meant = f"; is it {' or '.join(near)}?" if near else ""
    raise ValueError(f"there is no task {name!r}{meant} There are: {', '.join(sorted(table))}")
