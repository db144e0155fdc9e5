"""SIGKILL into the real `pretrain train`, then a resume, held bit for bit against a run in peace.

`bitwise_pairs` kills each family with each optimizer, with and without dropout, at named places: in
the Nth step, record, sample, evaluation, save, rename or deletion. `random_kills` kills at any
instant, many times in one run. What is compared is `tiny_runs.picture`.
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

import pretrain.checkpoint.save as saver_page
import pretrain.train.eval_hooks as eval_hooks_page
import pretrain.train.loop as loop_page
import pretrain.train.state as state_page
from faults.table import Row, Unrecovered
from faults.tiny_runs import (
    EVALUATE_EVERY,
    OFTEN,
    SAVE_EVERY,
    STEPS,
    in_child,
    lines_of,
    picture,
    prepare,
    resume,
    said,
    train,
)
from faults.zygote import Phase, fork, kill, side_by_side, wait_for
from pretrain.checkpoint import list_checkpoints
from pretrain.model.families import Family
from pretrain.run.log import RunLog

FAMILIES = get_args(Family)
OPTIMIZERS = ("adamw", "muon")
DROPOUTS = ("0", "0.1")
# Where a run dies, and how often it comes by there in STEPS steps.
PLACES: dict[str, tuple[Any, str, int]] = {
    "step": (loop_page, "compute_gradients", STEPS),
    "record": (RunLog, "append_metrics", STEPS + STEPS // EVALUATE_EVERY),
    "sample": (RunLog, "append_sample", STEPS // EVALUATE_EVERY),
    "evaluation": (eval_hooks_page, "score_batches", STEPS // EVALUATE_EVERY + 1),
    "save": (saver_page, "save_checkpoint", STEPS // SAVE_EVERY + 2),
    "rename": (saver_page, "_rename", STEPS // SAVE_EVERY + 2),
    "verification": (saver_page, "verify_saved", STEPS // SAVE_EVERY + 2),
    "deletion": (state_page, "prune", STEPS // SAVE_EVERY + 2),
    "summary": (loop_page, "write_json", 2),
}
KILL_POINTS = [(place, n) for place, (_, _, times) in PLACES.items() for n in range(1, times + 1)]


def die_at(place: str, number: int, *, after: bool) -> None:
    """From now on this process kills itself when it comes by a place for the Nth time, before or
    after what is done there."""
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
    began = time.monotonic()
    found = side_by_side(
        [
            partial(_pairs_of, scratch, text, chosen[n::workers], each=each, seed=seed)
            for n in range(workers)
        ]
    )
    tried, landed = (sum(each[n] for each in found) for n in (0, 1))
    note = f"{len(chosen)} combinations of family, optimizer and dropout; "
    note += f"{len(KILL_POINTS)} kill points, before and after; {time.monotonic() - began:.0f} s"
    return Row("bitwise equal after SIGKILL and resume", tried, landed, landed, note)


def _pairs_of(
    scratch: Path, text: Path, configs: list[tuple[str, str, str]], *, each: int, seed: int
) -> tuple[int, int]:
    tried = landed = 0
    for config in configs:
        family, optimizer, dropout = config
        words = ["--model.family", family, "--optimizer.name", optimizer, *OFTEN]
        words += ["--model.dropout", dropout, "--train.steps", str(STEPS)]
        words += ["--model.ngram_rows", "512"] * (family == "fast")
        name = "-".join(config)
        whole = scratch / f"{name}-whole"
        if in_child(lambda: train(text, whole, *words)) != 0:  # noqa: B023 - called at once
            raise Unrecovered(f"{name}: a run in peace failed: {said(whole)}")
        wanted = picture(whole)
        points = random.Random(f"{seed} {name}").sample(KILL_POINTS, len(KILL_POINTS))
        dead = 0
        for number, (place, n) in enumerate(points):
            if dead == each:
                break
            case, after = f"{name}, {place} number {n} (seed {seed})", number % 2 == 1
            run = scratch / f"{name}-{number}"
            tried += 1
            dead += _is_equal_after_death(text, run, words, place, n, after, wanted, case)
            shutil.rmtree(run)
            run.with_name(run.name + ".said").unlink()
        shutil.rmtree(whole)
        landed += dead
    return tried, landed


def _is_equal_after_death(
    text: Path,
    run: Path,
    words: list[str],
    place: str,
    number: int,
    after: bool,
    wanted: dict[str, str],
    case: str,
) -> bool:
    """Whether the run died where it was to; Unrecovered if it then does not become the other."""

    def dying() -> int:
        die_at(place, number, after=after)
        return train(text, run, *words)

    code = in_child(dying)
    if code not in (0, -signal.SIGKILL):
        raise Unrecovered(f"{case}: exit code {code}: {said(run)}")
    if in_child(lambda: resume(run)) != 0:
        raise Unrecovered(f"{case}: the resume failed: {said(run)}")
    refuse_difference(run, wanted, case)
    return code == -signal.SIGKILL


def refuse_difference(run: Path, wanted: dict[str, str], case: str) -> None:
    found = picture(run)
    # Who dies between the last save and the deletion after it leaves older ones besides.
    if set(wanted["checkpoints"].split()) <= set(found["checkpoints"].split()):
        found["checkpoints"] = wanted["checkpoints"]
    other = [key for key in wanted if found[key] != wanted[key]]
    if other:
        raise Unrecovered(f"{case}: not the uninterrupted run's: {', '.join(other)}")


def random_kills(scratch: Path, *, landed: int, seed: int, workers: int) -> Row:
    """SIGKILL at random instants until so many have landed in training; every run is then brought
    to its end and compared."""
    text, began = prepare(scratch), time.monotonic()
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
    note += f"{time.monotonic() - began:.0f} s"
    return Row("SIGKILL in `pretrain train`", tried, counted, counted, note)


TRAINING, FINISHED = 1, 2


def _kill_at_random(
    folder: Path, text: Path, landed: int, seed: int
) -> tuple[int, int, int, list[int]]:
    folder.mkdir()
    words = ["--model.family", "gpt2", "--model.dropout", "0.1", "--optimizer.name", "muon"]
    words += [*OFTEN, "--train.steps", str(2 * STEPS)]
    whole, chosen = folder / "whole", random.Random(seed)
    began = time.perf_counter()
    if in_child(lambda: train(text, whole, *words)) != 0:
        raise Unrecovered(f"a run in peace failed: {said(whole)}")
    # Short beside a run, so that each dies several times; long enough to come by a checkpoint.
    window, wanted = 0.3 * (time.perf_counter() - began), picture(whole)
    tried = counted = runs = 0
    lost: list[int] = []
    while counted < landed:
        run = folder / f"run-{runs}"
        while not (run / "report.html").is_file():
            begun, phase = (run / "config.yaml").is_file(), Phase()
            work = partial(_train_or_resume, text, run, words, begun, phase)
            # It may have died between its summary and its report: nothing to train is left then.
            if counted >= landed or (run / "summary.json").is_file():
                code = in_child(work)
                if code != 0:
                    raise Unrecovered(f"seed {seed}, run {runs}: exit code {code}: {said(run)}")
                continue
            tried += 1
            if _is_killed_in_training(work, phase, chosen.uniform(0, window)):
                counted += 1
                lost.append(_steps_made_again(run))
        refuse_difference(run, wanted, f"seed {seed}, run {runs} after {counted} kills in all")
        shutil.rmtree(run)
        runs += 1
    return tried, counted, runs, lost


def _train_or_resume(text: Path, run: Path, words: list[str], begun: bool, phase: Phase) -> int:
    real = loop_page.train

    def training(*args: Any, **keywords: Any) -> int:
        phase.set(TRAINING)
        code = real(*args, **keywords)
        phase.set(FINISHED)
        return code

    loop_page.train = training
    return resume(run) if begun else train(text, run, *words)


def _is_killed_in_training(work: Callable[[], int], phase: Phase, seconds: float) -> bool:
    child = fork(work)
    wait_for(phase, TRAINING)
    time.sleep(seconds)
    return kill(child) and phase.get() == TRAINING


def _steps_made_again(run: Path) -> int:
    """How many steps a killed run had recorded beyond its newest checkpoint."""
    metrics = run / "metrics.jsonl"
    made = max((r["step"] for r in lines_of(metrics)), default=0) if metrics.exists() else 0
    saved = [int(p.name.removeprefix("step-")) for p in list_checkpoints(run / "checkpoints")]
    return int(made) - max(saved, default=0)
