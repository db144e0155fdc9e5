"""What a config cannot know of itself: whether this machine has what it names, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pretrain.config import RunConfig
from pretrain.corpus import list_files
from pretrain.data.format import is_prepared
from pretrain.evaluate.task_files import read_in_loop_tasks, task_folder
from pretrain.report import require_packages


def mistakes_here(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Texts, packages and tasks that are not there, and a new run without an end: the fields that
    each hangs on, and a sentence."""
    for path in config.data.paths:
        try:
            if not is_prepared(path):
                list_files(path)
        except ValueError as error:
            yield "data.source", str(error)
    for tracker in config.report.to:
        try:
            require_packages([tracker])
        except ValueError as error:
            yield "report.to", str(error)
    try:
        read_in_loop_tasks(config.evaluate)
    except ValueError as error:
        yield "evaluate.tasks evaluate.task_files evaluate.texts evaluate.examples", str(error)
    has_end = config.train.steps is not None or config.train.minutes is not None
    # Sources of a list may be asked for as epochs, which end too.
    if not has_end and isinstance(config.data.source, str):
        yield (
            "train.steps train.minutes data.source",
            "nothing says how long to train: give train.steps or train.minutes",
        )


def with_whole_paths(config: RunConfig) -> RunConfig:
    """Sources and what is followed as absolute paths, so that a resume from another folder, or
    another environment, finds them."""
    source, asked = config.data.source, config.evaluate
    if isinstance(source, str):
        source = _whole(source)
    else:
        source = tuple(replace(entry, path=_whole(entry.path)) for entry in source)
    folder = task_folder(asked.task_data) if asked.tasks else None
    return replace(
        config,
        data=replace(config.data, source=source),
        corpus=replace(config.corpus, evaluation_texts=_all_whole(config.corpus.evaluation_texts)),
        evaluate=replace(
            asked,
            task_data=asked.task_data if folder is None else _whole(str(folder)),
            task_files=_all_whole(asked.task_files),
            texts=_all_whole(asked.texts),
        ),
    )


def _all_whole(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_whole(path) for path in paths)


def _whole(path: str) -> str:
    return path if path == "bundled" else str(Path(path).resolve())
