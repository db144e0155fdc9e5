"""What exactness costs: a step with all that watches over it against the same step without.

python benchmarks/exactness.py [--steps 40] [--threads 2]

The default recipe's model on the bundled text. Blocks of steps take turns, bare and watched, and
the ratio is taken pair by pair, since machines are noisy: bare is forward, backward and update
alone; watched adds the checksum of the ids, the judgement of the loss, the record on the disk, the
look at the saver. Then the parts by themselves, and how long a save makes training stand still.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.save import BackgroundSaver
from pretrain.config import compose
from pretrain.distributed import open_world
from pretrain.model.decoder import build
from pretrain.model.loss import LMLoss
from pretrain.optim.param_groups import build_optimizer, optimizer_state
from pretrain.run.log import RunLog
from pretrain.runner.request import read_target
from pretrain.runner.text import prepared_text
from pretrain.train.build import training_batches
from pretrain.train.monitor import SpikeDetector
from pretrain.train.resolve import resolve
from pretrain.train.step import training_steps

BLOCK_STEPS = 4


def microseconds(deed: Callable[[], Any], times: int = 200) -> float:
    began = time.perf_counter()
    for _ in range(times):
        deed()
    return (time.perf_counter() - began) / times * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    config = compose(read_target()[1])
    config = replace(config, train=replace(config.train, steps=1000, minutes=None))
    world = open_world("cpu", threads=args.threads)
    data = prepared_text(config)
    config = resolve(config, data, world)
    decoder = build(config.model, vocab_size=data.manifest.vocab_size, seed=1)
    lm_loss = LMLoss(decoder, seed=1)
    optimizer = build_optimizer(
        decoder.named_parameters(), config=config.optimizer, width=config.model.d_model
    )
    batches = training_batches(config, data)
    watch, loss, norm = SpikeDetector(6.0), 5.0, 1.0
    for i in range(64):
        watch.record(5.0 + 0.01 * (i % 7), None)
    with tempfile.TemporaryDirectory() as name:
        records, saver = RunLog(Path(name)), BackgroundSaver(Path(name) / "checkpoints")
        record = {
            **dict.fromkeys("step tokens ids".split(), 123456),
            **dict.fromkeys(
                "loss bits_per_byte learning_rate grad_norm seconds epoch".split(), 0.1
            ),
            "kind": "train",
        }

        def step(number: int, watched: bool) -> None:
            updates = training_steps(
                lm_loss,
                optimizer,
                lambda _: batches.at(number) if watched else bare(number),
                lr_at=lambda _: 1e-3,
                steps=1,
                clip=1.0,
                world=world,
            )
            next(updates)
            if watched:
                watch.check(loss, norm)
                watch.record(loss, None)
                records.append_metrics(record)
                saver.poll()

        def bare(number: int) -> list[Any]:
            """The same micro-batches without their checksum."""
            from pretrain.data.batches import micro_batch_at

            rows, first = batches.micro_batch_rows, number * batches.batch_size
            found = []
            for sample in range(first, first + batches.batch_size, rows):
                part = micro_batch_at(batches.stream, batches.order, sample=sample, rows=rows)
                # Counted by every trainer that reports bits per byte.
                int(batches.byte_lengths_V[part.targets].sum())
                found.append(part)
            return found

        ratios, seconds = [], []
        for block in range(-1, args.steps // BLOCK_STEPS):
            took = {}
            for watched in (False, True) if block % 2 else (True, False):
                began = time.perf_counter()
                for i in range(BLOCK_STEPS):
                    step(block * BLOCK_STEPS + i + BLOCK_STEPS, watched)
                took[watched] = time.perf_counter() - began
            if block >= 0:  # the first is warm-up
                ratios.append(took[True] / took[False])
                seconds.append(took[False] / BLOCK_STEPS)
        step_seconds = statistics.median(seconds)
        print(f"step          {1e3 * step_seconds:8.1f} ms, {world.threads} threads")
        low, high = min(ratios), max(ratios)
        print(
            f"watched/bare  {statistics.median(ratios):8.4f} (median of {len(ratios)} pairs, "
            f"{low:.3f} to {high:.3f})"
        )
        ids = torch.zeros(batches.batch_size, batches.order.context_length + 1, dtype=torch.int64)
        parts = {
            "checksum of the ids": lambda: zlib.crc32(ids.numpy().data),
            "judging the loss": lambda: watch.check(loss, norm),
            "a line of metrics.jsonl": lambda: records.append_metrics(record),
            "a look at the saver": saver.poll,
        }
        for what, deed in parts.items():
            took_us = microseconds(deed)
            print(f"  {what:<24} {took_us:7.1f} us, {took_us / 1e4 / step_seconds:.3f} % of a step")
        parameters = list(decoder.named_parameters())
        tensors = {f"model/{n}": p for n, p in parameters}
        state = optimizer_state(optimizer, parameters)
        tensors |= {f"optimizer/{n}": t for n, t in state.items()}
        n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        stalls, whole = [], []
        for number in range(1, 6):
            began = time.perf_counter()
            saver.save(step=number, tensors=tensors, state={})
            stalls.append(time.perf_counter() - began)
            saver.wait()
            whole.append(time.perf_counter() - began)
        stall, save = statistics.median(stalls), statistics.median(whole)
        print(
            f"a checkpoint of {n_bytes / 1e6:.0f} MB: training stands still for "
            f"{1e3 * stall:.0f} ms (the first {1e3 * stalls[0]:.0f}), it is on the disk and "
            f"verified after {save:.2f} s"
        )


if __name__ == "__main__":
    main()
