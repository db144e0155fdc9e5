"""Reads a run directory: in comes its path, out goes one `Run` with everything a report needs.

Any file may be missing or end in the middle of a line, because a run may be going on or have been
killed; what cannot be read is named in `Run.unreadable`, not raised. Refused is only a folder that
has neither config.yaml nor metrics.jsonl: that is no run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import yaml

Record = dict[str, object]
Point = tuple[float, float]


def number(value: object) -> float | None:
    """`value` if it is a finite number, else None (`"NaN"`, null, true, text, infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond the range of a float
        return None


def fields(value: object) -> Record:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def parse_record(line: str | bytes) -> Record | None:
    """One line of a .jsonl file, or None where it is not a whole JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def curve(records: Iterable[Record], key: str) -> list[Point]:
    """The points (step, value) of one field, where both are finite numbers."""
    pairs = ((number(record.get("step")), number(record.get(key))) for record in records)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def records_in(value: object) -> list[Record]:
    """The objects of a list; nothing where it is none."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


class Run:
    """What the files of a run directory say, read when it is made; records as in their files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name  # the name also of `.`
        self.unreadable: dict[str, str] = {}  # name of a file -> what is wrong with it
        metrics, baselines = self._lines("metrics.jsonl"), self._record("baselines.json")
        self.train = [record for record in metrics if record.get("kind") == "train"]
        self.evaluations = [record for record in metrics if record.get("kind") == "evaluate"]
        self.tasks = [record for record in metrics if record.get("kind") == "task"]
        self.samples = self._lines("samples.jsonl")
        self.predictions = self._record("predictions.json")
        self.baselines = records_in(baselines.get("baselines"))
        self.val_bytes = number(baselines.get("val_bytes"))
        self.config_text, self.config = self._text("config.yaml"), self._record("config.yaml")
        self.environment = self._record("environment.json")
        self.summary = self._record("summary.json")
        self.overlap = self._record("overlap.json")
        self.is_finished = bool(self.summary)  # it is written at the end

    @property
    def scored_step(self) -> int:
        """The step whose weights the final score is of: the best one that was kept."""
        name = str(self.summary.get("checkpoint", "")).rpartition("step-")[2]
        return int(name) if name.isdecimal() else self.last_step

    @property
    def last_step(self) -> int:
        """The number of updates done, as far as the files know; 0 for a run that just began."""
        last = [*self.train[-1:], *self.evaluations[-1:]] or [{"step": self.summary.get("steps")}]
        return round(max(number(record.get("step")) or 0 for record in last))

    def setting(self, section: str, key: str) -> float | None:
        """One number of config.yaml, or None."""
        fields = self.config.get(section)
        return number(fields.get(key)) if isinstance(fields, dict) else None

    def figure(self, key: str) -> float | None:
        """A key figure by its name in summary.json; before the end, from the records so far."""
        if (value := number(self.summary.get(key))) is not None:
            return value
        records = self.evaluations if key.startswith("val_") else self.train
        values = [y for _, y in curve(records, "seconds" if key == "train_seconds" else key)]
        if values and key == "tokens_per_second":  # a pause or a slow first step is no speed
            return statistics.median(values)
        return values[-1] if values else None

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            self.unreadable[name] = str(error.strerror)
            return ""

    def _lines(self, name: str) -> list[Record]:
        *lines, last = self._text(name).split("\n")
        records = [parse_record(line) for line in lines if line.strip()]
        if n_broken := records.count(None):
            self.unreadable[name] = f"{n_broken:,} broken line{'s' if n_broken > 1 else ''}"
        records.append(parse_record(last))  # it may still be in the writing, and is no accident
        return [record for record in records if record is not None]

    def _record(self, name: str) -> Record:
        text, is_yaml = self._text(name), name.endswith(".yaml")
        try:
            record = (yaml.safe_load(text) or {}) if is_yaml else json.loads(text or "{}")
        except (yaml.YAMLError, ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            return record
        self.unreadable[name] = f"not {'YAML sections' if is_yaml else 'a JSON object'}"
        return {}


def read_run(run_dir: str | Path) -> Run:
    """Reads the run at `run_dir`. Raises ValueError where there is no run."""
    folder = Path(run_dir)
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        what = "has neither config.yaml nor metrics.jsonl" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{str(folder)!r} {what}; expected is a run directory of `pretrain train`")
    return Run(folder)
