"""Experiment trackers as readers of metrics.jsonl: TensorBoard, and Weights & Biases offline.

`follow` runs in its own process (`python -m pretrain.report.trackers RUN --to tensorboard
--parent PID`), so that no tracker can slow down or stop training. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from pathlib import Path

from pretrain.report.config import TRACKERS, require_packages
from pretrain.report.run import RunFiles, read_run_files
from pretrain.report.units import number
from pretrain.run.directory import METRICS, SUMMARY
from pretrain.run.log import parse_line

# Kinds of records that are sent, each as a group of curves.
KINDS = ("train", "evaluate", "task")
# Of our event files: only these are replaced.
SUFFIX = ".pretrain"

Figures = dict[str, float]
Send = Callable[[int, Figures, float], None]
"""Send a step, its figures, and the seconds since the run started."""


def follow(
    run_dir: str | Path, to: Sequence[str], *, poll_seconds: float = 2.0, parent: int | None = None
) -> int:
    """Send the records of metrics.jsonl to the trackers until the run ends; return their number.

    The run has ended when summary.json exists, or when the process `parent`, which must have
    started this one, has ended. Raises ValueError for an unknown tracker, a missing package, or a
    folder that is not a run directory.
    """
    require_packages(to)
    run = read_run_files(run_dir)
    openers = {"tensorboard": _tensorboard, "wandb": _wandb}
    new_records = _new_records(run.folder / METRICS)
    n_sent, has_ended = 0, False
    with ExitStack() as stack:
        sends = [stack.enter_context(openers[name](run)) for name in to]
        while not has_ended:
            # Tested before reading, so that everything written before the end is read.
            is_orphan = parent is not None and os.getppid() != parent
            has_ended = is_orphan or (run.folder / SUMMARY).is_file()
            for record in next(new_records):
                for send in sends:
                    send(*record)
                n_sent += 1
            time.sleep(0 if has_ended else poll_seconds)
    return n_sent


def _new_records(path: Path) -> Iterator[list[tuple[int, Figures, float]]]:
    """Yield, again and again, the records of the lines that were added since the last time."""
    offset, inode, trained_seconds, last_steps = 0, 0, 0.0, defaultdict[str, float](lambda: -1.0)
    while True:
        lines, fresh = b"", []
        if path.exists():  # the run may not have written its first line yet
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != inode or stat.st_size < offset:
                    offset, inode = 0, stat.st_ino  # truncated by a resume: read it from its start
                file.seek(offset)
                # A line without its end is still being written, and is read the next time.
                lines, end, _ = file.read().rpartition(b"\n")
                offset += len(lines + end)
        for line in lines.split(b"\n"):
            record = parse_line(line) or {}
            kind, step = str(record.pop("kind", "")), number(record.pop("step", None))
            # Curves of each task are a group of their own.
            group = f"task/{record.get('task')}" if kind == "task" else kind
            if kind in KINDS and step is not None and step > last_steps[group]:  # none twice
                last_steps[group] = step
                numbers = {f"{group}/{key}": number(value) for key, value in record.items()}
                figures = {name: value for name, value in numbers.items() if value is not None}
                if kind != "task":  # whose seconds are those of the evaluation
                    trained_seconds = figures.get(f"{kind}/seconds", 0.0)
                fresh.append((round(step), figures, trained_seconds))
        yield fresh


@contextmanager
def _tensorboard(run: RunFiles) -> Iterator[Send]:
    """Event files in RUN/tensorboard, without torch; they replace those of an earlier process."""
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    target = run.folder / "tensorboard"
    for old in target.glob(f"events.out.tfevents.*{SUFFIX}"):
        old.unlink()  # metrics.jsonl is read from its start, so everything is written again
    try:  # the run's own clock, so that a later export has the same times
        start = datetime.fromisoformat(str(run.environment.get("started"))).timestamp()
    except ValueError:
        start = time.time()

    def send(step: int, figures: Figures, seconds: float) -> None:
        value = summary_pb2.Summary.Value
        values = [value(tag=name, simple_value=figure) for name, figure in figures.items()]
        summary = summary_pb2.Summary(value=values)
        writer.add_event(event_pb2.Event(wall_time=start + seconds, step=step, summary=summary))

    with closing(EventFileWriter(str(target), flush_secs=5, filename_suffix=SUFFIX)) as writer:
        yield send


@contextmanager
def _wandb(run: RunFiles) -> Iterator[Send]:
    """An offline run in RUN/wandb, which the user can upload by `wandb sync`."""
    import wandb

    with wandb.init(
        mode="offline",
        dir=str(run.folder.resolve()),
        project="pretrain",
        name=run.name,
        config=run.config,
        settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
    ) as offline:
        yield lambda step, figures, _: offline.log(figures, step=step)


def main() -> None:
    """Run the trackers of a run; exits with 2 if the arguments are wrong."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.report.trackers")
    parser.add_argument("run", help="the run directory")
    parser.add_argument("--to", required=True, nargs="+", choices=TRACKERS)
    parser.add_argument("--parent", type=int, help="end when this process has ended")
    chosen = parser.parse_args()
    # Ctrl-C is for the training process; its last lines are still sent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        follow(chosen.run, chosen.to, parent=chosen.parent)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
