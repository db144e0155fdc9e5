"""Experiment trackers as readers of metrics.jsonl: in comes a run directory, out go its numbers.

`follow` runs in a process of its own (`python -m pretrain.report.trackers RUN --to tensorboard
--parent PID`), so that no tracker can slow or break training. Nothing is uploaded: TensorBoard
gets files, W&B runs offline. Refused are unknown trackers and packages that are not installed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from pretrain.report.config import TRACKERS, ReportConfig
from pretrain.report.run import Record, number, parse_record, read_run

PREFIXES = {"train": "train", "evaluate": "evaluate"}  # kind of a record -> group of its curves
SUFFIX = ".pretrain"  # of our event files, so that only our own are ever replaced


class Tracker(Protocol):
    """Where records go."""

    def send(self, step: int, figures: dict[str, float], seconds: float | None) -> None:
        """Takes the figures of one step; `seconds` are those since the start of the run."""

    def close(self) -> None:
        """Writes whatever is left."""


def require_packages(to: Sequence[str]) -> None:
    """Raises ValueError, with the command that helps, where a tracker's package is missing."""
    for name in ReportConfig(to=tuple(to)).to:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of that name is no package
            raise ValueError(
                f"report.to contains {name!r}, but its package is not installed; "
                f"install it with: pip install 'pretrain[{name}]'"
            )


def follow(
    run_dir: str | Path, to: Sequence[str], *, poll_seconds: float = 2.0, parent: int | None = None
) -> int:
    """Sends every record of metrics.jsonl to the trackers until the run ends; returns how many.

    The run has ended when summary.json exists or when process `parent` is gone. So a run that is
    resumed or extended must have removed its old summary before it starts a follower. Raises
    ValueError for an unknown tracker, a missing package or a path that is no folder.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder; expected is a run directory")
    require_packages(to)
    makers: dict[str, Callable[[Path], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}
    trackers = [makers[name](folder) for name in to]
    lines, is_alive, n_sent = _Tail(folder / "metrics.jsonl"), _watch(parent), 0
    try:
        while True:
            # Asked before reading: what was written until the end is then certainly read.
            has_ended = (folder / "summary.json").is_file() or not is_alive()
            for record in lines.read_new():
                step, figures = round(number(record["step"]) or 0), _figures(record)
                for tracker in trackers:
                    tracker.send(step, figures, number(record.get("seconds")))
                n_sent += 1
            if has_ended:
                return n_sent
            time.sleep(poll_seconds)
    finally:
        for tracker in trackers:
            tracker.close()


class TensorBoard:
    """Event files in RUN/tensorboard, without torch. A new follower replaces those of the last."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        target = folder / "tensorboard"
        for old in target.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()  # metrics.jsonl is read from its start, so it is all written again
        self._events, self._summaries = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(target), flush_secs=5, filename_suffix=SUFFIX)
        self._start = _start_time(folder)

    def send(self, step: int, figures: dict[str, float], seconds: float | None) -> None:
        summary = self._summaries.Summary(
            value=[
                self._summaries.Summary.Value(tag=name, simple_value=figure)
                for name, figure in figures.items()
            ]
        )
        known = self._start is not None and seconds is not None
        wall_time = (self._start or 0.0) + (seconds or 0.0) if known else time.time()
        self._writer.add_event(self._events.Event(wall_time=wall_time, step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """An offline run in RUN/wandb; `wandb sync` uploads it when, and if, the user wants to."""

    def __init__(self, folder: Path) -> None:
        import wandb

        try:
            config = read_run(folder).config
        except ValueError:  # not even a config yet
            config = {}
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        self._run = wandb.init(
            mode="offline",
            dir=str(folder.resolve()),
            project="pretrain",
            name=folder.resolve().name,
            config=config,
            settings=quiet,
        )

    def send(self, step: int, figures: dict[str, float], seconds: float | None) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


class _Tail:
    """The whole lines that were added to a file, however it is cut back or replaced meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._inode = path, 0, 0
        self._sent: dict[str, float] = {}  # the last step that was sent, of each kind of record

    def read_new(self) -> list[Record]:
        """The records not yet given out, in the file's order."""
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._offset:
                    self._offset, self._inode = 0, stat.st_ino  # cut back by a resume: start over
                file.seek(self._offset)
                # A line without its end is still being written, and is left for the next time.
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:  # the run has not written its first line yet
            return []
        self._offset += len(whole + end)
        records = [parse_record(line) for line in whole.split(b"\n")]
        return [record for record in records if record and self._is_new(record)]

    def _is_new(self, record: Record) -> bool:
        kind, step = str(record.get("kind")), number(record.get("step"))
        if step is None or kind not in PREFIXES or step <= self._sent.get(kind, -1.0):
            return False
        self._sent[kind] = step
        return True


def _figures(record: Record) -> dict[str, float]:
    prefix = PREFIXES[str(record["kind"])]
    pairs = ((key, number(value)) for key, value in record.items() if key != "step")
    return {f"{prefix}/{key}": value for key, value in pairs if value is not None}


def _start_time(folder: Path) -> float | None:
    """When the run began, in seconds since 1970, so that a later reading has the same times."""
    try:
        started = parse_record((folder / "environment.json").read_bytes()) or {}
        return datetime.fromisoformat(str(started.get("started"))).timestamp()
    except (OSError, ValueError):
        return None


def _watch(parent: int | None) -> Callable[[], bool]:
    """A question that can be asked again and again: is process `parent` still there?"""
    if parent is None:
        return lambda: True
    if os.getppid() == parent:  # also right when the dead parent stays behind as a zombie
        return lambda: os.getppid() == parent
    return lambda: _exists(parent)


def _exists(process_id: int) -> bool:
    if os.name == "nt":  # there, os.kill would end the process instead of asking
        return True
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists, and belongs to another user
        return True
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The follower's own command; returns its exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.report.trackers")
    parser.add_argument("run", help="the run directory to follow")
    parser.add_argument("--to", required=True, nargs="+", choices=TRACKERS)
    parser.add_argument("--parent", type=int, help="end when this process is gone")
    chosen = parser.parse_args(arguments)
    # Ctrl-C is for the training process; the follower then still sends that one's last lines.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        follow(chosen.run, chosen.to, parent=chosen.parent)
    except ValueError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
