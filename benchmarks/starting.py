"""Seconds from a command to its help, and to the first step of the default run.

python benchmarks/starting.py [--rounds 5]

The text is prepared beforehand, as it is from the second run on. A run is stopped once the record
of its first step lies on the disk; what it measures to turn minutes into steps is part of the time.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from quiet import quiet_rounds
from rows import OURS, Row, rows_of, table

COMMAND = [sys.executable, "-m", "pretrain"]


def seconds_to_help() -> float:
    began = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def seconds_to_first_step() -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        began = time.perf_counter()
        process = subprocess.Popen(
            [*COMMAND, "train", "--run", str(run)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        records = run / "metrics.jsonl"
        while not (records.is_file() and records.stat().st_size):
            assert process.poll() is None, "the run ended before its first step"
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
        process.wait()
    return seconds


def measure(*, rounds: int) -> Iterator[Row]:
    measures: dict[str, Callable[[], float]] = {
        "`pretrain --help`": seconds_to_help,
        "`pretrain train`, to its first step": seconds_to_first_step,
    }

    def one_round(_: int) -> dict[str, float]:
        return {what: seconds() for what, seconds in measures.items()}

    one_round(0)  # caches of the disk, and the prepared text
    found, others = quiet_rounds(one_round, rounds=rounds)
    for what in measures:
        yield from rows_of(what, "s", [{OURS: each[what]} for each in found], others=others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    print("\n".join(table(measure(rounds=parser.parse_args().rounds))))


if __name__ == "__main__":
    main()
