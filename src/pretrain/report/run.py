"""Reads a run directory: in comes its path, out goes one `Run` with everything a report needs.

Any file may be missing or end in the middle of a line, because a run may be going on or have been
killed; what cannot be read is named in `Run.unreadable`, not raised. Refused is only a folder that
has neither config.yaml nor metrics.jsonl: that is no run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Run:
    """What the files of a run directory say; records are in the order of their steps."""

    folder: Path
    config: Record
    train: Sequence[Record]
    evaluations: Sequence[Record]
    samples: Sequence[Record]
    baselines: Sequence[Record]
    val_bytes: float | None
    environment: Record
    summary: Record
    unreadable: Sequence[str]

    @property
    def name(self) -> str:
        """The folder's own name, also when the path is `.`."""
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        """The number of updates done, as far as the files know; 0 for a run that just began."""
        steps = [
            number(records[-1]["step"]) for records in (self.train, self.evaluations) if records
        ]
        return round(max([step for step in steps if step is not None], default=self._final_step))

    @property
    def is_finished(self) -> bool:
        """Whether there is a summary, and it is not that of a run which has since gone on."""
        return bool(self.summary) and self._final_step >= self.last_step

    @property
    def _final_step(self) -> float:
        return number(self.summary.get("steps")) or 0.0

    def setting(self, section: str, key: str) -> object:
        """One value of config.yaml, or None."""
        fields = self.config.get(section)
        return fields.get(key) if isinstance(fields, dict) else None

    def figure(self, key: str) -> float | None:
        """A key figure by its name in summary.json; before the end, from the records so far."""
        if self.is_finished and (value := number(self.summary.get(key))) is not None:
            return value
        if key == "tokens_per_second":  # the middle one: a pause or a slow first step is no speed
            speeds = [value for _, value in curve(self.train, key)]
            return statistics.median(speeds) if speeds else None
        if key in (
            "parameters",
            "peak_memory_bytes",
        ):  # an older summary is still right about these
            return number(self.summary.get(key))
        records = self.evaluations if key.startswith("val_") else self.train
        points = curve(records, "seconds" if key == "train_seconds" else key)
        return points[-1][1] if points else None

    def first_broken_step(self) -> int | None:
        """The first step from which no later training loss is finite; None for a healthy run."""
        broken = None
        for record in reversed(self.train):
            if number(record.get("loss")) is not None:
                break
            broken = round(number(record["step"]) or 0)
        return broken


def read_run(run_dir: str | Path) -> Run:
    """Reads the run at `run_dir`. Raises ValueError where there is no run."""
    folder = Path(run_dir)
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        what = "has neither config.yaml nor metrics.jsonl" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{str(folder)!r} {what}; expected is a run directory of `pretrain train`")

    unreadable: list[str] = []
    metrics = _read_lines(folder / "metrics.jsonl", unreadable)
    baselines = _read_json(folder / "baselines.json", unreadable)
    entries = baselines.get("baselines")
    return Run(
        folder=folder,
        config=_read_yaml(folder / "config.yaml", unreadable),
        train=_by_step(record for record in metrics if record.get("kind") == "train"),
        evaluations=_by_step(record for record in metrics if record.get("kind") == "evaluate"),
        samples=_read_lines(folder / "samples.jsonl", unreadable),
        baselines=[entry for entry in entries if isinstance(entry, dict)]
        if isinstance(entries, list)
        else [],
        val_bytes=number(baselines.get("val_bytes")),
        environment=_read_json(folder / "environment.json", unreadable),
        summary=_read_json(folder / "summary.json", unreadable),
        unreadable=unreadable,
    )


def _by_step(records: Iterable[Record]) -> list[Record]:
    """In order and one a step: the later line wins, as after a resume that did not cut back."""
    latest = {
        step: record for record in records if (step := number(record.get("step"))) is not None
    }
    return [latest[step] for step in sorted(latest)]


def _read_text(path: Path, unreadable: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        unreadable.append(f"{path.name} ({error.strerror})")
        return ""


def _read_lines(path: Path, unreadable: list[str]) -> list[Record]:
    lines = _read_text(path, unreadable).split("\n")
    records = [parse_record(line) for line in lines]
    # The last line may still be in the writing; a broken line before it is worth a word.
    n_broken = sum(
        record is None and line.strip() != ""
        for record, line in zip(records[:-1], lines[:-1], strict=True)
    )
    if n_broken:
        unreadable.append(f"{path.name} ({n_broken:,} broken line{'s' if n_broken > 1 else ''})")
    return [record for record in records if record is not None]


def _read_json(path: Path, unreadable: list[str]) -> Record:
    text = _read_text(path, unreadable)
    record = parse_record(text)
    if record is None and text:
        unreadable.append(f"{path.name} (not a JSON object)")
    return record or {}


def _read_yaml(path: Path, unreadable: list[str]) -> Record:
    try:
        config = yaml.safe_load(_read_text(path, unreadable))
    except (yaml.YAMLError, ValueError, RecursionError):
        config = "broken"
    if config is not None and not isinstance(config, dict):
        unreadable.append(f"{path.name} (not YAML sections)")
        return {}
    return config or {}
