"""The files of a run directory, as a report or a tracker needs them.

A run may be in progress or may have been killed, so any file may be missing, or end in the middle
of a line. What cannot be read is listed in `RunFiles.unreadable`. ValueError is raised only for a
folder that has neither config.yaml nor metrics.jsonl, and so is not a run directory.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

import yaml

from pretrain.report.units import number
from pretrain.run import directory
from pretrain.run.log import parse_line

Record = dict[str, object]
Point = tuple[float, float]


def fields(value: object) -> Record:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def records_in(value: object) -> list[Record]:
    """The objects of a list; nothing if it is not a list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def curve(records: Iterable[Record], key: str) -> list[Point]:
    """The points (step, value) of one field, where both are finite numbers."""
    pairs = ((number(record.get("step")), number(record.get(key))) for record in records)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


class RunFiles:
    """The files of a run directory, read when it is made; records as in the files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name  # the name also of `.`
        self.unreadable: dict[str, str] = {}
        """what is wrong with a file, by its name"""
        metrics = self._read_lines(directory.METRICS)
        self.train = [record for record in metrics if record.get("kind") == "train"]
        self.evaluations = [record for record in metrics if record.get("kind") == "evaluate"]
        self.tasks = [record for record in metrics if record.get("kind") == "task"]
        self.samples = self._read_lines(directory.SAMPLES)
        self.predictions = self._read_object(directory.PREDICTIONS)
        baselines = self._read_object(directory.BASELINES)
        self.baselines = records_in(baselines.get("baselines"))
        self.val_bytes = number(baselines.get("val_bytes"))
        self.config_text = self._read_text(directory.CONFIG)
        self.config = self._read_object(directory.CONFIG)
        self.environment = self._read_object(directory.ENVIRONMENT)
        self.summary = self._read_object(directory.SUMMARY)
        self.overlap = self._read_object(directory.OVERLAP)
        self.is_finished = bool(self.summary)  # it is written at the end

    @property
    def scored_step(self) -> int:
        """The step of the evaluated weights, in a finished run those of its best checkpoint."""
        name = str(self.summary.get("checkpoint", "")).rpartition("step-")[2]
        return int(name) if name.isdecimal() else self.last_step

    @property
    def last_step(self) -> int:
        """The number of steps so far; 0 for a run that has just started."""
        last = self.train[-1:] + self.evaluations[-1:] or [{"step": self.summary.get("steps")}]
        return round(max(number(record.get("step")) or 0 for record in last))

    def figure(self, key: str) -> float | None:
        """A number of summary.json by its key; before the end of the run, from its log so far."""
        if (value := number(self.summary.get(key))) is not None:
            return value
        records = self.evaluations if key.startswith("val_") else self.train
        values = [y for _, y in curve(records, "seconds" if key == "train_seconds" else key)]
        if values and key == "tokens_per_second":  # the median ignores pauses and a slow first step
            return statistics.median(values)
        return values[-1] if values else None

    def _read_text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            self.unreadable[name] = str(error.strerror)
            return ""

    def _read_lines(self, name: str) -> list[Record]:
        *lines, last = self._read_text(name).split("\n")
        records = [parse_line(line) for line in lines if line.strip()]
        if n_broken := records.count(None):
            self.unreadable[name] = f"{n_broken:,} broken line{'s' if n_broken > 1 else ''}"
        records.append(parse_line(last))  # it may not be complete yet, which is not an error
        return [record for record in records if record is not None]

    def _read_object(self, name: str) -> Record:
        text, is_yaml = self._read_text(name), name.endswith(".yaml")
        try:
            record = (yaml.safe_load(text) or {}) if is_yaml else json.loads(text or "{}")
        except (yaml.YAMLError, ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            return record
        self.unreadable[name] = f"not {'YAML sections' if is_yaml else 'a JSON object'}"
        return {}


def read_run_files(run_dir: str | Path) -> RunFiles:
    """Read a run directory; raises ValueError if it is not one."""
    folder = Path(run_dir)
    if not any((folder / name).is_file() for name in (directory.CONFIG, directory.METRICS)):
        what = "has neither config.yaml nor metrics.jsonl" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{str(folder)!r} {what}; it must be a run directory of `pretrain train`")
    is_trained = any(
        (folder / name).is_file() for name in (directory.ENVIRONMENT, directory.METRICS)
    )
    if (folder / directory.CHECKPOINTS).is_dir() and not is_trained:
        raise ValueError(f"{folder} was imported, not trained, so there is nothing to report")
    return RunFiles(folder)
