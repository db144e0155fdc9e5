"""Files of tasks and of text -> tasks that are ready to be evaluated. Free of torch.

Used by `pretrain evaluate`, by `pretrain compare`, and for the tasks that a run evaluates while it
trains. Every file is read and checked before a model is loaded; what is missing or damaged is a
ValueError that names the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from pretrain.corpus.documents import Document, ReadingReport
from pretrain.corpus.files import DamagedStreamError, FileStream, list_files
from pretrain.corpus.reading import read_documents
from pretrain.evaluate.config import EvaluateConfig
from pretrain.evaluate.examples import Example, kind_of, read_examples, solved_text, with_shots
from pretrain.evaluate.metrics import statistics_of_answer
from pretrain.evaluate.tasks import METRICS, Task, task_named, task_of_kind
from pretrain.fileio import file_sha256

TASKS_VARIABLE = "PRETRAIN_TASKS"
# A text that is evaluated while a run trains is cut into chunks, one example each.
CHUNK_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class EvalTask:
    """A task with the examples that a model is evaluated on."""

    task: Task
    examples: tuple[Example, ...]
    """With the shots before each context."""
    solved_texts: tuple[str, ...] = ()
    """Context and right answer of each example as one text, without shots."""
    n_shots: int = 0
    seed: int = 1
    """Draws the shots, and the resamples of the bootstrap."""

    @property
    def chance(self) -> float | None:
        """The expected accuracy of a random choice, averaged over the examples; None where nothing
        is chosen."""
        if self.task.kind not in ("choice", "schema", "pair"):
            return None
        n_options = [len(e.contexts) * len(e.continuations) for e in self.examples]
        return math.fsum(1 / n for n in n_options) / len(n_options)


def load_tasks(
    names: Iterable[str],
    files: Iterable[str],
    *,
    folder: str | None = None,
    metric: str | None = None,
    limit: int | None = None,
    n_shots: int = 0,
    seed: int = 1,
) -> list[EvalTask]:
    """Read the first `limit` examples of tasks of the table, whose files are in `folder`, and of
    tasks in the user's own files, with `n_shots` solved ones before each. With a `metric`, all are
    judged by it. ValueError for files that are missing or damaged, for too few examples, and for a
    metric that does not fit the task, or whose library is missing."""
    with_files = [(task, find_task_file(task, folder)) for task in map(task_named, names)]
    for file in files:
        kind = kind_of(read_task_file(Path(file)), file=file)
        with_files.append((task_of_kind(kind, file), Path(file)))
    eval_tasks = []
    for task, path in with_files:
        if metric is not None:
            if metric not in METRICS[task.kind]:
                raise ValueError(
                    f"the metric of {task.name}, a task of the kind {task.kind}, must be one of "
                    f"{', '.join(METRICS[task.kind])} (got {metric})"
                )
            task = replace(task, metric=metric)
        if task.kind == "answer":
            statistics_of_answer(task.metric, "a", ["a"])  # raises where its library is missing
        examples = read_examples(task, read_task_file(path), file=str(path), limit=limit)
        solved_texts = tuple(solved_text(task, example) for example in examples)
        examples = with_shots(task, examples, shots=n_shots, seed=seed)
        eval_tasks.append(EvalTask(task, tuple(examples), solved_texts, n_shots, seed))
    return eval_tasks


def read_in_loop_tasks(config: EvaluateConfig) -> list[EvalTask]:
    """The tasks that a run evaluates while it trains: the first examples of each; of a text its
    first chunks, so that it has a standard error too. ValueError for what `pretrain evaluate`
    rejects, and for two files with the same name."""
    tasks = load_tasks(
        dict.fromkeys(config.tasks),
        config.task_files,
        folder=config.task_data,
        limit=config.examples,
    )
    # Named after their files, without folders.
    eval_tasks = [replace(t, task=replace(t.task, name=Path(t.task.name).name)) for t in tasks]
    for file in config.texts:
        report = ReadingReport()
        texts = (document.text for document in read_documents(file, report=report))
        chunks = islice((chunk for text in texts for chunk in chunks_of(text)), config.examples)
        examples = tuple(Example(("",), (chunk,)) for chunk in chunks)
        reject_partial_files(report)
        if not examples:
            raise ValueError(f"{file} contains no text")
        eval_tasks.append(EvalTask(task_of_kind("text", Path(file).name), examples))
    names = [each.task.name for each in eval_tasks]
    duplicates = [name for name in names if names.count(name) > 1]
    if duplicates:
        raise ValueError(
            f"two in-loop tasks have the name {min(duplicates)}, by which the log tells them "
            "apart; rename one of the files"
        )
    return eval_tasks


def chunks_of(text: str) -> Iterator[str]:
    """Cut a text into chunks of at most CHUNK_CHARACTERS, after white space where possible."""
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        stop = start + CHUNK_CHARACTERS
        cut = next((i for i in range(stop - 1, start, -1) if text[i].isspace()), stop)
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def task_folder(folder: str | Path | None) -> Path | None:
    """The folder of task files: `folder`, else the one in the environment variable."""
    name = folder or os.environ.get(TASKS_VARIABLE)
    return Path(name) if name else None


def find_task_file(task: Task, folder: str | Path | None) -> Path:
    """The file of a task in the user's folder. ValueError where it is missing or another file."""
    needs = f"task {task.name} needs the file {task.file} ({task.source})"
    directory = task_folder(folder)
    if directory is None:
        raise ValueError(
            f"{needs}; name the folder that contains it: --task-data DIR, in a config "
            f"evaluate.task_data, or the environment variable {TASKS_VARIABLE}"
        )
    path = directory / task.file
    if not path.is_file():
        raise ValueError(f"{needs}, which is not in {directory}")
    if task.sha256 is not None:
        sha256 = file_sha256(path)
        if sha256 != task.sha256:
            raise ValueError(
                f"{path} is not the file of task {task.name}: its sha256 is {sha256}, not "
                f"{task.sha256}; --task-file takes any file in the form of docs/how-to/tasks.md"
            )
    return path


def read_task_file(path: Path) -> str:
    """The text of one file, compressed or not. ValueError where it cannot be read."""
    first, *others = list_files(path)
    if others:
        raise ValueError(f"{path} is {1 + len(others)} files; it must be one file")
    with FileStream(first, ReadingReport()) as stream:
        content = stream.read()
    try:
        if stream.damage:
            raise stream.damage
        text = content.decode("utf-8-sig")
    except (DamagedStreamError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return text.replace("\r\n", "\n")


def read_whole(file: str, text_field: str | None) -> tuple[list[Document], dict[str, str]]:
    """The documents of a file, and what a user should know of the reading: which field was read,
    what was skipped. ValueError for a truncated file, and for one without any text."""
    report = ReadingReport()
    documents = list(read_documents(file, text_field=text_field, report=report))
    reject_partial_files(report)
    if not any(document.text for document in documents):
        first_problem = f"; {report.problems[0]}" if report.problems else ""
        raise ValueError(f"{file} contains no text{first_problem}")
    return documents, report.facts()


def reject_partial_files(report: ReadingReport) -> None:
    """ValueError where a file was cut off, so that only a part of its text would be scored."""
    if report.n_partial_files:
        raise ValueError(f"{report.problems[-1]}: only a part of the text would be scored")
