"""SIGKILL at random instants during the real save, over a growing history of checkpoints.

A child does what training does: `BackgroundSaver.save`, which writes, verifies, and forgets older
checkpoints. It is killed at an instant drawn from 1.2 times the measured duration of all that; a
kill counts if the child died of it within. Then the previous or the new checkpoint must be found,
whole, with the right numbers. The next child continues from there, over what the killed one left.
For comparison, the same is done to the usual `torch.save` over the file of the step before.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from faults.history import KEEP, History, check_folder
from faults.table import Row, Unrecovered
from faults.zygote import Phase, exit_code, fork, kill, side_by_side, wait_for
from pretrain.checkpoint import save as save_module
from pretrain.checkpoint.save import BackgroundSaver, prune

WRITING, VERIFYING, PRUNING, DONE = range(1, 5)
NAMES = {WRITING: "writing", VERIFYING: "verifying", PRUNING: "pruning"}
N_BYTES = 2 << 20
MEASURED_EVERY = 200


def save_in_background(folder: Path, history: History, step: int, phase: Phase) -> None:
    """Save as training does, and signal the phase. For children only: it patches the saver."""
    write = save_module.save_checkpoint

    def writing(*args: Any, **keywords: Any) -> Path:
        phase.set(WRITING)
        path = write(*args, **keywords)
        phase.set(VERIFYING)
        return path

    def forget() -> None:
        phase.set(PRUNING)
        prune(folder, keep=KEEP)

    save_module.save_checkpoint = writing
    saver = BackgroundSaver(folder)
    saver.save(step=step, tensors=history.tensors(step), state=history.state(step), after=forget)
    saver.wait()
    phase.set(DONE)


def killed_after(seconds: float, work: Callable[[Phase], object]) -> tuple[bool, int]:
    """Kill a child so long after it has begun to write; whether it died of that, and in which
    phase."""
    phase = Phase()
    child = fork(lambda: work(phase))
    wait_for(phase, WRITING)
    _sleep(seconds)
    died = kill(child)
    return died and WRITING <= phase.get() < DONE, phase.get()


def _sleep(seconds: float) -> None:
    # A sleep ends late by more than some saves last.
    until = time.perf_counter() + seconds
    if seconds > 0.002:
        time.sleep(seconds - 0.001)
    while time.perf_counter() < until:
        pass


def duration(work: Callable[[Phase], object]) -> float:
    """Seconds from WRITING to DONE of a child that is not killed, without its exit."""
    phase = Phase()
    child = fork(lambda: work(phase))
    wait_for(phase, WRITING)
    start_time = time.perf_counter()
    while phase.get() != DONE and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.0001)
    seconds = time.perf_counter() - start_time
    if phase.get() != DONE or exit_code(child) != 0:
        raise Unrecovered("a save that nobody killed failed")
    return seconds


def kill_the_saver(scratch: Path, *, landed: int, seed: int, workers: int = 1) -> Row:
    """Kill until `landed` kills have hit a save; `workers` at once, each with its own history."""
    start_time = time.perf_counter()
    found = side_by_side(
        [
            partial(
                _kill_the_saver,
                scratch / f"checkpoints-{n}",
                landed=landed // workers,
                seed=seed + n,
            )
            for n in range(workers)
        ]
    )
    total = {key: sum(each[key] for each in found) for key in found[0]}
    counted = sum(total[name] for name in NAMES.values())
    each = 1000 * (time.perf_counter() - start_time) / total["tried"]
    note = ", ".join(f"{total[name]:,} {name}" for name in NAMES.values())
    note += f"; {total['stayed']:,} left the step before as the newest; 4 files, "
    note += f"{N_BYTES / 1e6:.1f} MB; {each:.0f} ms each"
    return Row("SIGKILL in a save", total["tried"], counted, counted, note)


def _kill_the_saver(folder: Path, *, landed: int, seed: int) -> dict[str, int]:
    history = History(n_bytes=N_BYTES)
    history.begin(folder, (1, 2))
    newest, tried, stayed, where = 2, 0, 0, Counter[int]()

    def work(phase: Phase) -> None:
        save_in_background(folder, history, newest + 1, phase)

    window, chosen = 0.0, random.Random(seed)
    while sum(where.values()) < landed:
        if tried % MEASURED_EVERY == 0:
            # The speed of the machine varies, and a kill after the end tests nothing.
            seconds = []
            for _ in range(5):
                seconds.append(duration(work))
                newest = check_folder(folder, history, allowed=(newest + 1,), min_complete=KEEP)
            window = 1.2 * sorted(seconds)[2]
        tried += 1
        counts, phase = killed_after(chosen.uniform(0, window), work)
        # A child that was verifying had saved.
        allowed = (newest, newest + 1) if phase == WRITING else (newest + 1,)
        try:
            found = check_folder(
                folder, history, allowed=allowed, min_complete=KEEP, every_byte=False
            )
        except Unrecovered as error:
            text = f"seed {seed}, kill {tried}, {NAMES.get(phase, 'after the save')}: {error}"
            raise Unrecovered(text) from None
        stayed += counts and found == newest
        where[phase] += counts
        newest = found
    return {"tried": tried, "stayed": stayed, **{NAMES[at]: where[at] for at in NAMES}}


def kill_torch_save(scratch: Path, *, landed: int, seed: int) -> Row:
    """The same harness for `torch.save` in place."""
    history, path = History(n_bytes=N_BYTES), scratch / "ckpt.pt"
    newest, tried, kept, counted = 1, 0, 0, 0
    torch.save(history.tensors(newest), path)

    def work(phase: Phase) -> None:
        content = history.tensors(newest + 1)
        phase.set(WRITING)
        torch.save(content, path)
        phase.set(DONE)

    def is_step(step: int, content: dict[str, torch.Tensor]) -> bool:
        expected = history.tensors(step)
        return all(torch.equal(content[name], expected[name]) for name in expected)

    window = 1.2 * sorted(duration(work) for _ in range(5))[2]
    chosen = random.Random(seed)
    while counted < landed:
        tried += 1
        counts, _ = killed_after(chosen.uniform(0, window), work)
        whole = False
        with contextlib.suppress(Exception):  # every kind of error that a half file gives
            found = torch.load(path, weights_only=True)
            whole = is_step(newest, found) or is_step(newest + 1, found)
        counted += counts
        kept += counts and whole
        if not whole:
            torch.save(history.tensors(newest), path)
    note = f"{counted - kept:,} left nothing that can be loaded"
    return Row("SIGKILL in `torch.save` over the old file", tried, counted, kept, note, ours=False)
