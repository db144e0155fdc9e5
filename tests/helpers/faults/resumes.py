"""SIGKILL into the real `pretrain train`, then a resume, compared bit for bit with an
uninterrupted run.

`bitwise_pairs` kills each family with each optimizer, with and without dropout, at named places: in
the Nth step, record, sample, evaluation, save, rename or deletion. `random_kills` kills at any
instant, many times in one run. What is compared is `tiny_runs.run_hashes`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pretrain.checkpoint.save as save_module
import pretrain.train.eval_hooks as eval_hooks_page
import pretrain.train.loop as loop_page
from faults.table import Row, Unrecovered
from faults.tiny_runs import (
    EVALUATE_EVERY,
    OFTEN,
    SAVE_EVERY,
    STEPS,
    in_child,
    lines_of,
    output_of,
    prepare,
    resume,
    run_hashes,
    train,
)
from faults.zygote import Phase, fork, kill, side_by_side, wait_for
from pretrain.checkpoint.load import list_checkpoints
from pretrain.model.families import Family
from pretrain.parallel.model import ParallelModel
from pretrain.run.log import RunLog

FAMILIES = get_args(Family)
OPTIMIZERS = ("adamw", "muon")
DROPOUTS = ("0", "0.1")
# Where a run is killed, and how often it passes there in STEPS steps.
PLACES: dict[str, tuple[Any, str, int]] = {
    "step": (ParallelModel, "compute_gradients", STEPS),
    "record": (RunLog, "append_metrics", STEPS + STEPS // EVALUATE_EVERY),
    "sample": (RunLog, "append_sample", STEPS // EVALUATE_EVERY),
    "evaluation": (eval_hooks_page, "score_batches", STEPS // EVALUATE_EVERY + 1),
    "save": (save_module, "save_checkpoint", STEPS // SAVE_EVERY + 2),
    "rename": (save_module, "_rename", STEPS // SAVE_EVERY + 2),
    "verification": (save_module, "verify_saved", STEPS // SAVE_EVERY + 2),
    "deletion": (save_module, "prune", STEPS // SAVE_EVERY + 2),
    "summary": (loop_page, "write_json", 2),
}
KILL_POINTS = [(place, n) for place, (_, _, times) in PLACES.items() for n in range(1, times + 1)]


def die_at(place: str, number: int, *, after: bool) -> None:
    """Let this process kill itself when it passes a place for the Nth time, before or after the
    work there."""
    owner, name, _ = PLACES[place]
    real, seen = getattr(owner, name), 0

    def dying(*args: Any, **keywords: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **keywords)
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def bitwise_pairs(scratch: Path, *, each: int, configs: int, seed: int, workers: int) -> Row:
    """`each` kill points for each of the first `configs` of all combinations."""
    text = prepare(scratch)
    chosen = [(f, o, d) for d in reversed(DROPOUTS) for o in OPTIMIZERS for f in FAMILIES][:configs]
    start_time = time.monotonic()
    found = side_by_side(
        [
            partial(_pairs_of, scratch, text, chosen[n::workers], each=each, seed=seed)
            for n in range(workers)
        ]
    )
    tried, landed = (sum(each[n] for each in found) for n in (0, 1))
    note = f"{len(chosen)} combinations of family, optimizer and dropout; "
    note += (
        f"{len(KILL_POINTS)} kill points, before and after; {time.monotonic() - start_time:.0f} s"
    )
    return Row("bitwise equal after SIGKILL and resume", tried, landed, landed, note)


def _pairs_of(
    scratch: Path, text: Path, configs: list[tuple[str, str, str]], *, each: int, seed: int
) -> tuple[int, int]:
    tried = landed = 0
    for config in configs:
        family, optimizer, dropout = config
        args = ["--model.family", family, "--optimizer.name", optimizer, *OFTEN]
        args += ["--model.dropout", dropout, "--train.steps", str(STEPS)]
        args += ["--model.ngram_rows", "512"] * (family == "fast")
        name = "-".join(config)
        uninterrupted = scratch / f"{name}-whole"
        if in_child(lambda: train(text, uninterrupted, *args)) != 0:  # noqa: B023 - called at once
            raise Unrecovered(f"{name}: the uninterrupted run failed: {output_of(uninterrupted)}")
        expected = run_hashes(uninterrupted)
        points = random.Random(f"{seed} {name}").sample(KILL_POINTS, len(KILL_POINTS))
        dead = 0
        for number, (place, n) in enumerate(points):
            if dead == each:
                break
            case, after = f"{name}, {place} number {n} (seed {seed})", number % 2 == 1
            run = scratch / f"{name}-{number}"
            tried += 1
            dead += _is_equal_after_death(text, run, args, place, n, after, expected, case)
            shutil.rmtree(run)
            run.with_name(run.name + ".output").unlink()
        shutil.rmtree(uninterrupted)
        landed += dead
    return tried, landed


def _is_equal_after_death(
    text: Path,
    run: Path,
    args: list[str],
    place: str,
    number: int,
    after: bool,
    expected: dict[str, str],
    case: str,
) -> bool:
    """Whether the run died at the planned place; Unrecovered if its resume gives another run."""

    def dying() -> int:
        die_at(place, number, after=after)
        return train(text, run, *args)

    code = in_child(dying)
    if code not in (0, -signal.SIGKILL):
        raise Unrecovered(f"{case}: exit code {code}: {output_of(run)}")
    if in_child(lambda: resume(run)) != 0:
        raise Unrecovered(f"{case}: the resume failed: {output_of(run)}")
    check_equal(run, expected, case)
    return code == -signal.SIGKILL


def check_equal(run: Path, expected: dict[str, str], case: str) -> None:
    found = run_hashes(run)
    # A kill between the last save and the deletion after it leaves older checkpoints too.
    if set(expected["checkpoints"].split()) <= set(found["checkpoints"].split()):
        found["checkpoints"] = expected["checkpoints"]
    other = [key for key in expected if found[key] != expected[key]]
    if other:
        raise Unrecovered(f"{case}: not the uninterrupted run's: {', '.join(other)}")


def random_kills(scratch: Path, *, landed: int, seed: int, workers: int) -> Row:
    """SIGKILL at random instants until `landed` kills have hit training; every run is then resumed
    to its end and compared."""
    text, start_time = prepare(scratch), time.monotonic()
    found = side_by_side(
        [
            partial(_kill_at_random, scratch / f"r{n}", text, landed // workers, seed + n)
            for n in range(workers)
        ]
    )
    tried, counted, runs = (sum(each[n] for each in found) for n in (0, 1, 2))
    lost = sorted(step for each in found for step in each[3])
    note = f"{runs} runs brought to their end and equal; steps made again: median "
    note += f"{statistics.median(lost):.0f}, most {lost[-1]} (saved every {SAVE_EVERY}); "
    note += f"{time.monotonic() - start_time:.0f} s"
    return Row("SIGKILL in `pretrain train`", tried, counted, counted, note)


TRAINING, FINISHED = 1, 2


def _kill_at_random(
    folder: Path, text: Path, landed: int, seed: int
) -> tuple[int, int, int, list[int]]:
    folder.mkdir()
    args = ["--model.family", "gpt2", "--model.dropout", "0.1", "--optimizer.name", "muon"]
    args += [*OFTEN, "--train.steps", str(2 * STEPS)]
    uninterrupted, chosen = folder / "whole", random.Random(seed)
    start_time = time.perf_counter()
    if in_child(lambda: train(text, uninterrupted, *args)) != 0:
        raise Unrecovered(f"the uninterrupted run failed: {output_of(uninterrupted)}")
    # Shorter than a run, so that each dies several times; long enough to reach a checkpoint.
    window, expected = 0.3 * (time.perf_counter() - start_time), run_hashes(uninterrupted)
    tried = counted = runs = 0
    lost: list[int] = []
    while counted < landed:
        run = folder / f"run-{runs}"
        while not (run / "report.html").is_file():
            begun, phase = (run / "config.yaml").is_file(), Phase()
            work = partial(_train_or_resume, text, run, args, begun, phase)
            # If it died between its summary and its report, there is nothing left to train.
            if counted >= landed or (run / "summary.json").is_file():
                code = in_child(work)
                if code != 0:
                    raise Unrecovered(
                        f"seed {seed}, run {runs}: exit code {code}: {output_of(run)}"
                    )
                continue
            tried += 1
            if _is_killed_in_training(work, phase, chosen.uniform(0, window)):
                counted += 1
                lost.append(_steps_made_again(run))
        check_equal(run, expected, f"seed {seed}, run {runs} after {counted} kills in all")
        shutil.rmtree(run)
        runs += 1
    return tried, counted, runs, lost


def _train_or_resume(text: Path, run: Path, args: list[str], begun: bool, phase: Phase) -> int:
    real = loop_page.train

    def training(*args: Any, **keywords: Any) -> int:
        phase.set(TRAINING)
        code = real(*args, **keywords)
        phase.set(FINISHED)
        return code

    loop_page.train = training
    return resume(run) if begun else train(text, run, *args)


def _is_killed_in_training(work: Callable[[], int], phase: Phase, seconds: float) -> bool:
    child = fork(work)
    wait_for(phase, TRAINING)
    time.sleep(seconds)
    return kill(child) and phase.get() == TRAINING


def _steps_made_again(run: Path) -> int:
    """The number of steps a killed run had recorded after its newest checkpoint."""
    metrics = run / "metrics.jsonl"
    made = max((r["step"] for r in lines_of(metrics)), default=0) if metrics.exists() else 0
    saved = [int(p.name.removeprefix("step-")) for p in list_checkpoints(run / "checkpoints")]
    return int(made) - max(saved, default=0)
