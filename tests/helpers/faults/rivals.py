"""Other disturbances of a run: a second writer, a clock that jumps, and signals.

A second `train --resume` is rejected with the owner of the run; once that process is killed, it
starts. A clock that is years off, or runs backwards, changes no number. SIGTERM, SIGINT and
SIGUSR1 in a step, an evaluation, a sample or a save lose no step; the second one ends the run at
once, and costs no checkpoint.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pretrain.checkpoint.save as save_module
import pretrain.train.eval_hooks as eval_hooks_page
from faults.resumes import check_equal
from faults.table import Row, Unrecovered
from faults.tiny_runs import (
    OFTEN,
    STEPS,
    in_child,
    lines_of,
    output_of,
    prepare,
    resume,
    run_hashes,
    train,
)
from faults.zygote import Phase, fork, kill, wait_for
from pretrain.checkpoint.load import list_checkpoints
from pretrain.parallel.model import ParallelModel

ARGS = [*OFTEN, "--model.family", "gpt2", "--model.dropout", "0.1", "--train.steps", str(STEPS)]
YEAR_SECONDS = 365 * 86_400
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PLACES: dict[str, tuple[Any, str, int]] = {
    "the step": (ParallelModel, "compute_gradients", 5),
    "the evaluation": (eval_hooks_page, "score_batches", 2),
    "the sample": (eval_hooks_page, "generate", 2),
    "the save": (save_module, "save_checkpoint", 3),
    "the verification": (save_module, "verify_saved", 3),
}


def run_all(scratch: Path, *, every: int) -> Iterator[Row]:
    """All of them, compared with one uninterrupted run; of clocks and signals one in `every`."""
    text = prepare(scratch)
    uninterrupted = scratch / "whole"
    if in_child(lambda: train(text, uninterrupted, *ARGS)) != 0:
        raise Unrecovered(f"the uninterrupted run failed: {output_of(uninterrupted)}")
    expected = run_hashes(uninterrupted)
    yield _second_writer(scratch / "two", text, expected)
    yield _clocks(scratch, text, expected, every=every)
    yield _signals(scratch, text, expected, every=every)


def _second_writer(run: Path, text: Path, expected: dict[str, str]) -> Row:
    phase, real = Phase(), ParallelModel.compute_gradients

    def standing(*args: Any, **keywords: Any) -> Any:
        phase.set(phase.get() + 1)
        if phase.get() == 5:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*args, **keywords)

    def first() -> int:
        with mock.patch.object(ParallelModel, "compute_gradients", standing):
            return train(text, run, *ARGS)

    holder = fork(first)
    wait_for(phase, 5)
    before = (run / "metrics.jsonl").read_bytes()
    code = in_child(lambda: resume(run))
    if code != 2 or f"is being trained by process {holder}" not in output_of(run):
        raise Unrecovered(f"a second writer ended with {code}: {output_of(run)}")
    if (run / "metrics.jsonl").read_bytes() != before:
        raise Unrecovered("a rejected second writer has written")
    if not kill(holder) or not (run / "run.lock").exists():
        raise Unrecovered("the first writer was not killed while it had the lock")
    if in_child(lambda: resume(run)) != 0:
        raise Unrecovered(f"the lock of a dead writer blocks the run: {output_of(run)}")
    check_equal(run, expected, "after two writers")
    return Row("a second writer, then a dead one's lock", 2, 2, 2, "exit code 2, which names it; 0")


def _clocks(scratch: Path, text: Path, expected: dict[str, str], *, every: int) -> Row:
    real, ticks = time.time, itertools.count()
    clocks: dict[str, Callable[[], float]] = {
        "a year behind": lambda: real() - YEAR_SECONDS,
        "a year ahead": lambda: real() + YEAR_SECONDS,
        "backwards": lambda: real() - 3600.0 * next(ticks),
        "to and back": lambda: real() + YEAR_SECONDS * (-1) ** next(ticks),
        "at the beginning": lambda: 0.0,
    }
    chosen = list(clocks.items())[::every]
    for name, clock in chosen:
        run = scratch / "clock"
        stop = partial(_at_place, "the step", (signal.SIGKILL,))
        first = in_child(partial(_under_a_clock, clock, stop, lambda: train(text, run, *ARGS)))  # noqa: B023 - called at once
        # Newer checkpoints look older, as on a disk written by another machine.
        for path in list_checkpoints(run / "checkpoints"):
            os.utime(path, (4e9 - int(path.name[-8:]),) * 2)
        then = in_child(partial(_under_a_clock, clock, _nothing, lambda: resume(run)))  # noqa: B023
        if (first, then) != (-signal.SIGKILL, 0):
            raise Unrecovered(f"a clock {name}: {first}, {then}: {output_of(run)}")
        check_equal(run, expected, f"a clock {name}")
        shutil.rmtree(run)
    note = f"{', '.join(name for name, _ in chosen)}; killed and resumed, equal"
    return Row("a clock that is wrong", len(chosen), len(chosen), len(chosen), note)


def _nothing() -> None:
    pass


def _under_a_clock(clock: Callable[[], float], prepared: Callable[[], None], work: Any) -> int:
    prepared()
    with (
        mock.patch.object(time, "time", clock),
        mock.patch.object(time, "gmtime", lambda *at: _gmtime(*at or (clock(),))),
    ):
        return int(work())


_gmtime = time.gmtime


def _signals(scratch: Path, text: Path, expected: dict[str, str], *, every: int) -> Row:
    n = 0
    cases = itertools.product(SIGNALS, PLACES, (False, True))
    for number, place, twice in itertools.islice(cases, 0, None, every):
        run = scratch / "signal"
        case = f"{number.name}{' twice' * twice} in {place}"
        sent = (number,) * (1 + twice)

        def signalled(place: str = place, sent: tuple[int, ...] = sent) -> int:
            # A shell that starts the suite in the background ignores it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _at_place(place, sent)
            return train(text, run, *ARGS)  # noqa: B023 - called at once

        code = in_child(signalled)
        if code != 128 + number:
            raise Unrecovered(f"{case}: exit code {code}: {output_of(run)}")
        made = max(int(line["step"]) for line in lines_of(run / "metrics.jsonl"))
        newest = int(list_checkpoints(run / "checkpoints")[-1].name[-8:])
        if made != newest and not twice:
            raise Unrecovered(f"{case}: {made - newest} steps were lost")
        if in_child(lambda: resume(run)) != 0:  # noqa: B023
            raise Unrecovered(f"{case}: the resume failed: {output_of(run)}")
        check_equal(run, expected, case)
        shutil.rmtree(run)
        n += 1
    note = f"{', '.join(PLACES)}; once (0 steps lost) and twice; resumed, equal"
    return Row("SIGTERM, SIGINT, SIGUSR1", n, n, n, note)


def _at_place(place: str, sent: tuple[int, ...]) -> None:
    """Let this process send itself signals when it passes a place for the Nth time."""
    owner, name, number = PLACES[place]
    real, seen = getattr(owner, name), 0

    def signalling(*args: Any, **keywords: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            for each in sent:
                os.kill(os.getpid(), each)
        return real(*args, **keywords)

    setattr(owner, name, signalling)
