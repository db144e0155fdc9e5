"""Runs that are started as commands in several processes, and what they have written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.checkpoint.load import Checkpoint
from tiny import TINY

N_STEPS = 24
SETTINGS = [
    *TINY,
    *f"--train.steps {N_STEPS} --train.save_every 4 --train.evaluate_every 8".split(),
    *"--model.family fast --model.ngram_rows 512".split(),
]
TIMEOUT_SECONDS = 120


def start_command(*command: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command with one thread a process, its output in one pipe."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment},
    )


def start_training(corpus: Path, run: Path, *settings: str) -> subprocess.Popen[str]:
    """Start `pretrain train` on a corpus."""
    command = [sys.executable, "-m", "pretrain", "train", str(corpus), "--run", str(run)]
    return start_command(*command, *SETTINGS, *settings)


def finish(process: subprocess.Popen[str], exit_code: int = 0) -> str:
    """Wait for the exit code and return the output.

    Raises TimeoutExpired, with the output and what each Python thread was doing, where that takes
    too long; nothing that the process started is left then.
    """
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        pids = descendants(process.pid)
        for number in (signal.SIGABRT, signal.SIGKILL):  # PYTHONFAULTHANDLER prints at an abort
            for pid in reversed(pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(1)
        output, _ = process.communicate()
        raise subprocess.TimeoutExpired(process.args, TIMEOUT_SECONDS, output) from None
    assert process.returncode == exit_code, output
    return output


def descendants(pid: int) -> list[int]:
    """Return a process and all that it started, and those started, each after its parent."""
    pids = [pid]
    for parent in pids:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                pids += map(int, path.read_text().split())
    return pids


def wait_for(condition: Callable[[], Any]) -> Any:
    """Wait until a condition is true, and return its value."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not true after {TIMEOUT_SECONDS} seconds")


def rank_pids(launcher: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of the ranks that a launcher has started, by rank."""
    pids = {}
    for children in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if variable.startswith(b"RANK="):
                    pids[int(variable.partition(b"=")[2])] = pid
    return [pids[rank] for rank in sorted(pids)]


def is_dead(pid: int) -> bool:
    """Return whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def is_saved(run: Path, step: int) -> bool:
    """Return whether the checkpoint of a step exists."""
    return (run / f"checkpoints/step-{step:08d}").is_dir()


def losses(run: Path) -> list[float]:
    """Return the loss of each step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def saved_tensors(run: Path, step: int = N_STEPS) -> dict[str, Any]:
    """Return the weights and the optimizer state of a checkpoint, as nested lists."""
    checkpoint = Checkpoint(run / f"checkpoints/step-{step:08d}")
    names = [f"{group}/{n}" for group in ("model", "optimizer") for n in checkpoint.names(group)]
    return {name: checkpoint.read(name).tolist() for name in names}
