"""Weak scaling: two processes of one thread, each with as many rows as one alone.

python benchmarks/scaling.py [--rounds 5] [--recipe english] [--steps 20]

In a round each of four makes some steps of the recipe, one after another: a process alone; two that
train each its own model at the same time and share nothing but the machine, which is the most that
two can do; two that sum gradients while the backward pass continues; two whose gradients are all in
one bucket, which is full when the pass is over. Time stamps say when the sum of the first bucket
began and when the last one was full, which is the end of the pass. Nothing else should run: each
process is to have a core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from quiet import quiet_rounds
from rows import OURS, Row, spread, table

from pretrain.config import compose
from pretrain.runner.request import read_target
from pretrain.runner.text import prepared_text

WARM_STEPS = 4
ALONE, APART = "1 process", "2 processes, a model each"
TOGETHER, AFTERWARDS = "2 processes", "2 processes, summed afterwards"


def member(recipe: str, steps: int, kind: str, answer: str) -> None:
    """One process of a round; the first one writes its answer."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.nn.parallel import DistributedDataParallel

    from pretrain.distributed import open_world
    from pretrain.parallel import model as parallel_model
    from pretrain.parallel.config import ParallelConfig
    from pretrain.train.build import trial_steps
    from pretrain.train.resolve import resolve

    config = compose(read_target(recipe)[1])
    answers = os.environ["RANK"] == "0"
    if kind == APART:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    world, data = open_world("cpu", threads=1), prepared_text(config)
    tokens = (config.train.batch_tokens or 8192) * world.size
    train = replace(config.train, steps=steps, batch_tokens=tokens, precision="fp32", minutes=None)
    parallel = ParallelConfig(processes=world.size)
    config = resolve(replace(config, train=train, parallel=parallel), data, world)
    begun: list[float] = []

    class Watched(DistributedDataParallel):
        """Notes when the sum of each bucket begins."""

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            # Torch reads a hook's annotations, and these are text.
            self.register_comm_hook(None, lambda state, bucket: noting(bucket))

    def noting(bucket: Any) -> torch.futures.Future[torch.Tensor]:
        begun.append(time.perf_counter())
        return default_hooks.allreduce_hook(None, bucket)

    class AllInOne(Watched):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, bucket_cap_mb=1 << 20, **named)

    kinds = {ALONE: Watched, APART: Watched, TOGETHER: Watched, AFTERWARDS: AllInOne}
    with mock.patch.object(parallel_model, "DistributedDataParallel", kinds[kind]):
        seconds, shares = [], []
        for step, took in enumerate(trial_steps(config, data, world, steps=steps)):
            if step >= WARM_STEPS:
                seconds.append(took)
                shares.append((len(begun), begun[-1] - begun[0] if begun else 0.0))
            begun.clear()
    if answers:
        models = 2 if kind == APART else 1
        found = {
            "tokens_per_second": models * tokens / statistics.median(seconds),
            "buckets": statistics.median(n for n, _ in shares),
            "under_way_seconds": statistics.median(s for _, s in shares),
            "step_seconds": statistics.median(seconds),
            "memory": world.peak_memory_bytes(),
        }
        Path(answer).write_text(json.dumps(found))
    world.leave()


def ask(recipe: str, steps: int, kind: str) -> dict[str, float]:
    """What the members of one kind come to."""
    from pretrain.runner.launch import launch

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        os.environ["OMP_NUM_THREADS"] = "1"
        args = ["--member", kind, "--answer", f"{folder}/answer"]
        args += ["--recipe", recipe, "--steps", str(steps)]
        launch(args, 1 if kind == ALONE else 2, program=[__file__])
        found: dict[str, float] = json.loads(Path(f"{folder}/answer").read_text())
        return found


def measure(*, rounds: int, recipe: str, steps: int) -> Iterator[Row]:
    kinds = (ALONE, APART, TOGETHER, AFTERWARDS)
    turns, others = quiet_rounds(
        lambda _: {kind: ask(recipe, steps, kind) for kind in kinds}, rounds=rounds
    )
    for kind in kinds:
        ratios = [t[kind]["tokens_per_second"] / t[ALONE]["tokens_per_second"] for t in turns]
        last = turns[-1][kind]
        note = f"{spread(ratios)} times one process"
        if kind in (TOGETHER, AFTERWARDS):
            note += (
                f"; of a step of {last['step_seconds']:.2f} s the backward pass continues for "
                f"{last['under_way_seconds']:.3f} s after the first of {last['buckets']:.0f} sums"
            )
        yield Row(
            what=f"weak scaling of the recipe {recipe}, a thread a process",
            who=f"{OURS}, {kind}",
            unit="tokens/s",
            values=tuple(turn[kind]["tokens_per_second"] for turn in turns),
            others=others,
            memory=int(last["memory"]),
            note=note,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", default="english")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--member", help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.member:
        member(args.recipe, args.steps, args.member, args.answer)
        return
    rows = measure(rounds=args.rounds, recipe=args.recipe, steps=args.steps)
    print("\n".join(table(list(rows))))


if __name__ == "__main__":
    main()
