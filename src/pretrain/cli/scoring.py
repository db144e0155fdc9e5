"""What `evaluate`, `compare` and the tasks of `train` share: which texts and tasks are asked, and
how a model answers."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.evaluate.config import EvaluateConfig
from pretrain.evaluate.examples import Example, kind_of, read_examples, solved_text, with_shots
from pretrain.evaluate.following import Followed, followed_text
from pretrain.evaluate.metrics import statistics_of_answer
from pretrain.evaluate.tasks import Task, task_named, task_of_kind, with_metric

if TYPE_CHECKING:
    from pretrain.corpus import ReadingReport
    from pretrain.evaluate import Score
    from pretrain.evaluate.metrics import Array
    from pretrain.evaluate.results import Results
    from pretrain.runner.open import LoadedModel

DATA_VARIABLE = "PRETRAIN_TASKS"
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


@dataclass(frozen=True, slots=True)
class Asked:
    """A task and its examples, as they are put to every model."""

    task: Task
    examples: list[Example]
    texts: list[str]
    """Of each example, without shots, its context and what is right."""
    shots: int
    seed: int

    def protocol(self, model: LoadedModel, results: Results) -> str:
        """How the task was asked, in a line."""
        tokenizer, n = model.tokenizer, len(self.examples)
        begins = tokenizer.add_bos or self.task.kind in ("pair", "text")
        start = tokenizer.id_to_token(tokenizer.start_of_text) if begins else "nothing"
        shots = f"{self.shots} shots of seed {self.seed}" if self.shots else "no shots"
        cut = f", {results.n_cut:,} of them cut from the left" if results.n_cut else ""
        behind = f"{self.task.delimiter!r} behind it"
        if self.task.kind == "answer":
            stops = " or ".join(map(repr, self.task.stops))
            behind = f"at most {self.task.max_tokens} tokens written greedily, to the first {stops}"
        return (
            f"{self.task.kind}, {n:,} example{'' if n == 1 else 's'}, {shots}, {start} before a "
            f"context, {behind}, in {model.precision}{cut}"
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
    parser.add_argument("--tasks", metavar="NAME,...", help="tasks in docs/how-to/tasks.md")
    parser.add_argument(
        "--task-data", metavar="DIR", help=f"folder with the tasks' files [${DATA_VARIABLE}]"
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


def read_asked(arguments: argparse.Namespace) -> list[Asked]:
    """The tasks that are asked, read and checked before a model is loaded. ValueError for what is
    missing or does not go together."""
    from pretrain.corpus import list_files

    for name in arguments.text or []:
        list_files(name)  # a wrong path is said at once
    idle = [name for name, usual in _OF_TASKS.items() if getattr(arguments, name, usual) != usual]
    if idle and not (arguments.tasks or arguments.task_file):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"{names} is for tasks; give --tasks or --task-file with it")
    for option, least in (("stride", 1), ("limit", 1), ("shots", 0), ("seed", 0)):
        given = getattr(arguments, option)
        if given is not None and given < least:
            raise ValueError(f"--{option} is {given}; it must be at least {least}")
    folder = task_folder(arguments.task_data)
    named = [name.strip() for name in (arguments.tasks or "").split(",") if name.strip()]
    found = [(task, find_file(task, folder)) for task in map(task_named, dict.fromkeys(named))]
    for name in dict.fromkeys(arguments.task_file or []):
        found.append((own_task(name, name=name), Path(name)))
    if arguments.tasks is not None and not named:
        raise ValueError("--tasks names no task")
    return [_asked(task, path, arguments) for task, path in found]


def task_folder(given: str | None) -> Path | None:
    """The folder of the tasks' files: what was given, else what the environment says."""
    folder = given or os.environ.get(DATA_VARIABLE)
    return Path(folder) if folder else None


def own_task(file: str, *, name: str) -> Task:
    """The task that a file of the user's own asks."""
    return task_of_kind(kind_of(text_of(Path(file)), file=file), name)


def read_followed(config: EvaluateConfig) -> list[Followed]:
    """What a run follows: the first examples of each task, by the names of tasks and files.
    ValueError for what `pretrain evaluate` refuses, and for two files of one name."""
    from pretrain.corpus import ReadingReport, list_files, read_documents

    folder, found = task_folder(config.task_data), []
    for task in map(task_named, dict.fromkeys(config.tasks)):
        found.append(_first_examples(task, find_file(task, folder), config.examples))
    for file in config.task_files:
        task = own_task(file, name=Path(file).name)
        found.append(_first_examples(task, Path(file), config.examples))
    for file in config.texts:
        list_files(file)
        report = ReadingReport()
        texts = (document.text for document in read_documents(file, report=report))
        found.append(followed_text(Path(file).name, texts, limit=config.examples))
        _refuse_partial(report)
    names = [followed.task.name for followed in found]
    if double := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"{min(double)} is followed twice; records tell tasks and files apart by their names"
        )
    return found


def _first_examples(task: Task, path: Path, limit: int) -> Followed:
    examples = _examples_of(task, path, limit=limit)
    return Followed(task, tuple(with_shots(task, examples, shots=0, seed=1)))


def find_file(task: Task, folder: Path | None) -> Path:
    """The file of a task in the user's folder. ValueError where it is not there, or another."""
    what = f"task {task.name} needs the file {task.file} ({task.source})"
    if folder is None:
        raise ValueError(
            f"{what}; name the folder that holds it: --task-data DIR, in a config "
            "evaluate.task_data, or the environment's PRETRAIN_TASKS"
        )
    path = folder / task.file
    if not path.is_file():
        raise ValueError(f"{what}, and there is none in {folder}")
    if task.sha256 is not None:
        with open(path, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != task.sha256:
            raise ValueError(
                f"{path} is not the file of task {task.name}: its sha256 is {found}, not "
                f"{task.sha256}; --task-file takes any file in the form of docs/how-to/tasks.md"
            )
    return path


def text_of(path: Path) -> str:
    """The text of one file, compressed or not. ValueError where it cannot be read."""
    from pretrain.corpus import ReadingReport, list_files
    from pretrain.corpus.streams import DamagedStreamError, read_chunks

    first, *more = list_files(path)
    if more:
        raise ValueError(f"{path} is {1 + len(more)} files; legal: one")
    try:
        text = b"".join(read_chunks(first, report=ReadingReport())).decode("utf-8-sig")
    except (DamagedStreamError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return text.replace("\r\n", "\n")


def _asked(task: Task, path: Path, arguments: argparse.Namespace) -> Asked:
    if arguments.metric is not None:
        task = with_metric(task, arguments.metric)
    examples = _examples_of(task, path, limit=arguments.limit)
    texts = [solved_text(task, example) for example in examples]
    examples = with_shots(task, examples, shots=arguments.shots, seed=arguments.seed)
    return Asked(task, examples, texts, arguments.shots, arguments.seed)


def _examples_of(task: Task, path: Path, *, limit: int | None) -> list[Example]:
    if task.kind == "answer":
        statistics_of_answer(task.metric, "a", ["a"])  # a library that is missing is said at once
    return read_examples(task, text_of(path), file=str(path), limit=limit)


def open_scored(name: str, arguments: argparse.Namespace) -> LoadedModel:
    """The model, beginning contexts as was asked for."""
    from pretrain.runner.open import load_model

    model = load_model(name, device=arguments.device)
    begins = STARTS[arguments.start_of_text]
    if begins is not None:
        model.tokenizer.add_bos = begins
    return model


def answers_of(model: LoadedModel, asked: Asked, stride: int | None) -> Results:
    from pretrain.evaluate.results import ask

    return ask(
        model.decoder,
        model.tokenizer,
        asked.task,
        asked.examples,
        world=model.world,
        precision=model.precision,
        stride=stride,
    )


def conditions_of(model: LoadedModel, asked: Asked, stride: int | None) -> dict[str, Any]:
    """Nats a byte of the references with the task, with another and with none; how likely chance
    makes such differences; and the metric of answers that need no model."""
    from pretrain.evaluate import conditions
    from pretrain.evaluate.errors import compare
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


def read_texts(file: str, text_field: str | None) -> tuple[list[str], str]:
    """The texts of a file, and what of it was skipped or repaired, in words. ValueError for one
    that is cut off, and where no text is left."""
    from pretrain.corpus import ReadingReport, read_documents

    report = ReadingReport()
    texts = [each.text for each in read_documents(file, text_field=text_field, report=report)]
    _refuse_partial(report)
    first = f"; {report.problems[0]}" if report.problems else ""
    if not any(texts):
        raise ValueError(f"{file} holds no text{first}")
    counts = {
        "files skipped": report.n_skipped_files,
        "documents skipped": report.n_skipped_records,
        "documents repaired": report.n_repaired,
    }
    said = ", ".join(f"{what}: {n:,}" for what, n in counts.items() if n)
    return texts, said and said + first


def _refuse_partial(report: ReadingReport) -> None:
    if report.n_partial_files:
        raise ValueError(f"{report.problems[-1]}: a part of a text would be scored")


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

    from pretrain.evaluate.errors import estimate

    return {name: asdict(estimate(name, rows, seed=seed)) for name, rows in statistics.items()}
