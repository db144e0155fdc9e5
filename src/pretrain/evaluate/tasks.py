"""The table of tasks: kind, file, prompt and metric of each.

The table is tasks.toml, one section a task. A file in the documented form (docs/how-to/tasks.md) is
a task too, whose kind follows from the fields of its records.
"""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pretrain.validation import suggestion

Kind = Literal["choice", "cloze", "schema", "answer", "pair", "text"]
# All metrics of each kind, the default first.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The definition of one task."""

    name: str
    kind: Kind
    metric: str
    """The main metric; all metrics of the kind are reported."""
    file: str
    """Name of its file, in the user's folder of task files."""
    sha256: str | None = None
    """Hash of the file; None if everybody makes it in the documented form."""
    form: Literal["jsonl", "six lines", "squad", "text", "lines"] = "jsonl"
    context: str = ""
    """Template over a record's fields; empty: the record's own context, query or question."""
    choices: tuple[str, ...] = ()
    """Templates; empty: the record's own choices."""
    gold: str = "gold"
    """The field with the right choice: its number, or one of `labels`."""
    labels: tuple[str, ...] = ()
    delimiter: str
    """Between a context and its continuation."""
    unconditional: str = ""
    """Context of the p(choice) that divides p(choice | context); empty: a start-of-text."""
    description: str = ""
    """Before all shots and the context."""
    between: str = "\n\n"
    """Between shots."""
    stops: tuple[str, ...] = ("\n",)
    """Strings that end an answer."""
    max_tokens: int = 32
    answer_after: str = ""
    """If set, only the text after its last occurrence is compared, of answer and references."""
    wrong: str = ""
    """Another task with the same inputs, to measure the effect of naming the task."""
    papers: tuple[str, ...] = ()
    source: str = ""


@cache
def tasks() -> dict[str, Task]:
    """The table, by name."""
    text = importlib.resources.files("pretrain.evaluate").joinpath("tasks.toml").read_text("utf-8")
    return {name: task_of_kind(name=name, **fields) for name, fields in tomllib.loads(text).items()}


def task_of_kind(kind: Kind, file: str, **fields: Any) -> Task:
    """A task with the first metric and the delimiter of its kind, and the name of its file, where
    `fields` have no other."""
    delimiter = "" if kind in ("pair", "text") else " "  # these follow on the start of a text
    values: dict[str, Any] = {"name": file, "metric": METRICS[kind][0], "delimiter": delimiter}
    values |= {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    return Task(kind=kind, file=file, **values)


def task_named(name: str, among: Iterable[str] = ()) -> Task:
    """The task of this name in the table. ValueError with the nearest name, `among` those that a
    command takes, for an unknown one."""
    if name not in tasks():
        raise ValueError(f"unknown task {name!r}; {suggestion(name, among or sorted(tasks()))}")
    return tasks()[name]
