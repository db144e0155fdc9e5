"""A run's own record: metrics.jsonl and samples.jsonl, a line a fact, cut back when a run is
resumed.

After a resume the files are those of an uninterrupted run, times aside; what was cut off is kept
beside them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.distributed import World
from pretrain.fileio import replace_file, sync_folder

METRICS, SAMPLES, SUMMARY = "metrics.jsonl", "samples.jsonl", "summary.json"


class CannotSave(Exception):
    """Nothing can be written here; what was saved before is whole, and can be resumed."""

    exit_code = 75


@contextmanager
def _stopping_if_it_fails(path: Path) -> Iterator[None]:
    # A disk that became full, read-only or broken is no mistake of the user's, and none of ours.
    try:
        yield
    except OSError as error:
        raise CannotSave(
            f"{path} could not be written: {error.strerror}; mend that, then: --resume"
        ) from error


def _plain(value: Any) -> Any:
    # JSON has no NaN; a reader that is not Python would refuse the whole line.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a whole JSON file so that a reader sees the old one or the new one, never half of
    it."""
    text = json.dumps({k: _plain(v) for k, v in content.items()}, indent=2) + "\n"
    with _stopping_if_it_fails(path):
        replace_file(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run; ValueError, and not one of the library's, for one that was damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content


@dataclass(frozen=True, slots=True)
class Records:
    """The growing files of one run directory; or, in a process that `writes` none, what the first
    one wrote, in memory, without the steps of its own time."""

    folder: Path
    writes: bool = True
    _told: list[dict[str, Any]] = field(default_factory=list)
    _sums: dict[str, Any] = field(default_factory=dict)
    """The hash of each file so far, once it was asked for."""

    def take_up(self, world: World) -> None:
        """Let each process know the metrics that the first one has."""
        if world.size > 1:
            told = json.loads(
                world.broadcast_str(json.dumps(self.metrics() if self.writes else []))
            )
            self._told[:] = told if not self.writes else []

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        if not self.writes and record["kind"] != "train":
            self._told.append({k: _plain(v) for k, v in record.items()})
        self._append(METRICS, record)

    def add_sample(self, record: Mapping[str, Any]) -> None:
        self._append(SAMPLES, record)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        text = json.dumps({k: _plain(v) for k, v in record.items()}, ensure_ascii=False)
        path, line = self.folder / name, f"{text}\n".encode()
        with _stopping_if_it_fails(path), open(path, "ab") as file:
            file.write(line)
        if name in self._sums:
            self._sums[name].update(line)

    def sums(self) -> dict[str, tuple[int, str]]:
        """How long each file is now, and what hash it has: what a checkpoint says of them."""
        found = {}
        for name in (METRICS, SAMPLES):
            path = self.folder / name
            content = path.read_bytes() if name not in self._sums and path.exists() else b""
            digest = self._sums.setdefault(name, hashlib.sha256(content))
            size = path.stat().st_size if path.exists() else 0
            found[name] = (size, digest.hexdigest())
        return found

    def sum_of(self, name: str, n_bytes: int) -> str:
        """The hash of the first `n_bytes` of a file, or of what there is."""
        path = self.folder / name
        if not path.exists():
            return hashlib.sha256().hexdigest()
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(n_bytes)).hexdigest()

    def sync(self) -> None:
        """Bring lines and names to the disk itself, as a checkpoint that counts on them does."""
        for name in (METRICS, SAMPLES):
            if (self.folder / name).exists():
                with open(self.folder / name, "rb") as file:
                    os.fsync(file.fileno())
        # samples.jsonl may be younger than everything that has brought the folder to the disk.
        sync_folder(self.folder)

    def metrics(self) -> list[dict[str, Any]]:
        if not self.writes:
            return self._told
        return [record for record, _ in _lines(self.folder / METRICS)]

    def cut_back(self, step: int) -> None:
        """Drop the records of later steps than `step`; they are kept in NAME.cut-1, NAME.cut-2,
        ..."""
        if not self.writes:
            return
        for name in (METRICS, SAMPLES):
            path = self.folder / name
            lines = _lines(path)
            kept = [text for record, text in lines if record["step"] <= step]
            content = "".join(kept).encode()
            if not path.exists() or content == path.read_bytes():
                continue
            numbers = (n for n in range(1, 10**6))
            aside = next(
                p for n in numbers if not (p := path.with_name(f"{name}.cut-{n}")).exists()
            )
            # A copy, not a rename: there is never a moment without the file.
            shutil.copyfile(path, aside)
            replace_file(path, content)
            self._sums.pop(name, None)


def _lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Records with their text; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    found = []
    # Lines end at "\n" alone: samples may hold any other character that Unicode calls a line end.
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for text in file:
            try:
                record = json.loads(text)
            except ValueError:
                continue
            if (
                text.endswith("\n")
                and isinstance(record, dict)
                and {"kind", "step"} & record.keys()
            ):
                found.append((record, text))
    return found


@dataclass(slots=True)
class Best:
    """The best evaluation so far, and how many came after it: a pure function of the records."""

    step: int | None = None
    nats_per_token: float = math.inf
    since: int = 0

    def note(self, step: int, nats_per_token: float) -> bool:
        """Take in an evaluation; True if it is a new best."""
        if nats_per_token < self.nats_per_token:
            self.step, self.nats_per_token, self.since = step, nats_per_token, 0
            return True
        self.since += 1
        return False

    @staticmethod
    def of(records: list[dict[str, Any]]) -> Best:
        best = Best()
        for record in records:
            if record["kind"] == "evaluate":
                nats = record["val_nats_per_token"]  # null where it was no number
                best.note(record["step"], math.nan if nats is None else nats)
        return best
