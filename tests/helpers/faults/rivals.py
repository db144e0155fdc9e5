"""What else reaches into a run: a second writer, a clock that jumps, and signals.

A second `train --resume` is refused and says who trains; once that one is killed, nothing stands
in the way. A clock that is years off, or runs backwards, changes no number. SIGTERM, SIGINT and
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

import pretrain.checkpoint.save as saver_page
import pretrain.train.eval_hooks as eval_hooks_page
import pretrain.train.loop as loop_page
from faults.resumes import refuse_difference
from faults.table import Row, Unrecovered
from faults.tiny_runs import (
    OFTEN,
    STEPS,
    in_child,
    lines_of,
    picture,
    prepare,
    resume,
    said,
    train,
)
from faults.zygote import Phase, fork, kill, wait_for
from pretrain.checkpoint import list_checkpoints
from pretrain.train.step import compute_gradients

WORDS = [*OFTEN, "--model.family", "gpt2", "--model.dropout", "0.1", "--train.steps", str(STEPS)]
YEAR_SECONDS = 365 * 86_400
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PLACES: dict[str, tuple[Any, str, int]] = {
    "the step": (loop_page, "compute_gradients", 5),
    "the evaluation": (eval_hooks_page, "score_batches", 2),
    "the sample": (eval_hooks_page, "generate", 2),
    "the save": (saver_page, "save_checkpoint", 3),
    "the verification": (saver_page, "verify_saved", 3),
}


def meet(scratch: Path, *, every: int) -> Iterator[Row]:
    """All of them, against one run in peace; of clocks and signals one in `every`."""
    text = prepare(scratch)
    whole = scratch / "whole"
    if in_child(lambda: train(text, whole, *WORDS)) != 0:
        raise Unrecovered(f"a run in peace failed: {said(whole)}")
    wanted = picture(whole)
    yield _second_writer(scratch / "two", text, wanted)
    yield _clocks(scratch, text, wanted, every=every)
    yield _signals(scratch, text, wanted, every=every)


def _second_writer(run: Path, text: Path, wanted: dict[str, str]) -> Row:
    phase, real = Phase(), compute_gradients

    def standing(*args: Any, **keywords: Any) -> Any:
        phase.set(phase.get() + 1)
        if phase.get() == 5:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*args, **keywords)

    def first() -> int:
        with mock.patch.object(loop_page, "compute_gradients", standing):
            return train(text, run, *WORDS)

    holder = fork(first)
    wait_for(phase, 5)
    before = (run / "metrics.jsonl").read_bytes()
    code = in_child(lambda: resume(run))
    if code != 2 or f"is being trained by process {holder}" not in said(run):
        raise Unrecovered(f"a second writer ended with {code} and said: {said(run)}")
    if (run / "metrics.jsonl").read_bytes() != before:
        raise Unrecovered("a second writer that was refused has written")
    if not kill(holder) or not (run / "run.lock").exists():
        raise Unrecovered("the first writer was not killed while it held the run")
    if in_child(lambda: resume(run)) != 0:
        raise Unrecovered(f"a dead writer's lock stands in the way: {said(run)}")
    refuse_difference(run, wanted, "after two writers")
    return Row("a second writer, then a dead one's lock", 2, 2, 2, "exit code 2, which names it; 0")


def _clocks(scratch: Path, text: Path, wanted: dict[str, str], *, every: int) -> Row:
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
        first = in_child(partial(_under_a_clock, clock, stop, lambda: train(text, run, *WORDS)))  # noqa: B023 - called at once
        # Newer checkpoints look older, as on a disk that another machine wrote on.
        for path in list_checkpoints(run / "checkpoints"):
            os.utime(path, (4e9 - int(path.name[-8:]),) * 2)
        then = in_child(partial(_under_a_clock, clock, _nothing, lambda: resume(run)))  # noqa: B023
        if (first, then) != (-signal.SIGKILL, 0):
            raise Unrecovered(f"a clock {name}: {first}, {then}: {said(run)}")
        refuse_difference(run, wanted, f"a clock {name}")
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


def _signals(scratch: Path, text: Path, wanted: dict[str, str], *, every: int) -> Row:
    n = 0
    cases = itertools.product(SIGNALS, PLACES, (False, True))
    for number, place, twice in itertools.islice(cases, 0, None, every):
        run = scratch / "signal"
        case = f"{number.name}{' twice' * twice} in {place}"
        sent = (number,) * (1 + twice)

        def signalled(place: str = place, sent: tuple[int, ...] = sent) -> int:
            # A shell that starts the suite in the background has it ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _at_place(place, sent)
            return train(text, run, *WORDS)  # noqa: B023 - called at once

        code = in_child(signalled)
        if code != 128 + number:
            raise Unrecovered(f"{case}: exit code {code}: {said(run)}")
        made = max(int(line["step"]) for line in lines_of(run / "metrics.jsonl"))
        newest = int(list_checkpoints(run / "checkpoints")[-1].name[-8:])
        if made != newest and not twice:
            raise Unrecovered(f"{case}: {made - newest} steps were lost")
        if in_child(lambda: resume(run)) != 0:  # noqa: B023
            raise Unrecovered(f"{case}: the resume failed: {said(run)}")
        refuse_difference(run, wanted, case)
        shutil.rmtree(run)
        n += 1
    note = f"{', '.join(PLACES)}; once (0 steps lost) and twice; resumed, equal"
    return Row("SIGTERM, SIGINT, SIGUSR1", n, n, n, note)


def _at_place(place: str, sent: tuple[int, ...]) -> None:
    """From now on this process sends itself signals when it comes by a place for the Nth time."""
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
