"""The units of a step, one after the other or on several processes of this machine."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

from pretrain.data.job import Job, Step
from pretrain.data.steps import STEPS

Progress = Callable[[str, float], None]
"""Called with the title of a step and its fraction done, 0 to 1."""

_worker_job: Job | None = None


def do_steps(job: Job, *, workers: int, progress: Progress | None) -> None:
    """Do all units of all steps that are not done yet, with `workers` processes.

    With more than one a script must have the usual `if __name__ == "__main__"`. A worker that dies
    is an OSError; the units that are done stay.
    """
    with ExitStack() as opened:
        pool: ProcessPoolExecutor | None = None
        for step in STEPS:
            undone = [n for n in range(step.n_units(job)) if not job.place(step.name, n).is_dir()]
            if workers > 1 and len(undone) > 1 and pool is None:
                # Not fork: a forked process inherits locks of threads that it does not have.
                pool = ProcessPoolExecutor(
                    workers,
                    mp_context=get_context("spawn"),
                    initializer=_begin,
                    initargs=(job.folder, os.getpid()),
                )
                opened.callback(pool.shutdown, cancel_futures=True)
            if pool is not None and len(undone) > 1:
                _do_on(pool, job, step, undone, progress)
            else:
                _do_here(job, step, undone, progress)


def _do_here(job: Job, step: Step, units: list[int], progress: Progress | None) -> None:
    shown = -1.0
    for done, unit in enumerate(units):

        def show(fraction: float, done: int = done) -> None:
            nonlocal shown
            whole = (done + min(fraction, 1.0)) / len(units)
            if progress is not None and whole >= shown + 0.005:
                progress(step.title, whole)
                shown = whole

        show(0.0)
        job.on_fraction = show
        job.do(step, unit)
        show(1.0)


def _do_on(
    pool: ProcessPoolExecutor, job: Job, step: Step, units: list[int], progress: Progress | None
) -> None:
    waiting: dict[Future[None], int] = {}
    try:
        for unit in units:
            try:
                waiting[pool.submit(_do, STEPS.index(step), unit)] = unit
            except (ValueError, OSError) as cause:
                # Python starts workers in submit; one that dies meanwhile closes what that needs.
                raise BrokenProcessPool from cause
        while waiting:
            if progress is not None:
                progress(step.title, 1 - len(waiting) / len(units))
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                unit, error = waiting.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise error
                if error is not None:
                    # It fails here as it did there, and is told like any other error.
                    job.do(step, unit)
    except BrokenProcessPool:
        text = (
            f"a worker was killed while {step.title}, perhaps for want of memory; the same command "
            "goes on where it stopped, and takes less memory with fewer --workers"
        )
        raise OSError(errno.ENOMEM, text) from None
    if progress is not None:
        progress(step.title, 1.0)


def _begin(folder: Path, parent: int) -> None:
    """Make this process a worker, which ends with its parent however that ends."""
    global _worker_job
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _worker_job = Job(folder)


def _do(step: int, unit: int) -> None:
    assert _worker_job is not None
    _worker_job.do(STEPS[step], unit)
