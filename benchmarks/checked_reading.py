"""What it costs that each block of ids is compared with its checksum when it is first read.

python benchmarks/checked_reading.py [--steps 673] [--context 256]

The batches of the recipe `english` are read from a folder that was just opened, and again when all
blocks are known to be good. Seconds of the processor, so that other programs do not count.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from pretrain.config import compose, read_file
from pretrain.data.batches import micro_batch_at
from pretrain.distributed import open_world
from pretrain.runner.request import recipes
from pretrain.runner.text import prepared_text
from pretrain.train.config import filled
from pretrain.train.resolve import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=673)
    parser.add_argument("--context", type=int, default=256)
    options = parser.parse_args()
    steps, context = options.steps, options.context
    config = compose([read_file(recipes()["english"])])
    warm, data = prepared_text(config), prepared_text(config)
    # That its steps are given makes a calibration unnecessary.
    config = replace(config, train=replace(config.train, steps=steps, minutes=None))
    resolved = resolve(config, data, open_world("cpu", threads=None))
    rows = filled(resolved.train.batch_tokens) // context
    order = data.order(context_length=context, seed=config.train.seed)
    passes = []
    for opened in (warm, data, data):
        stream = opened.split("train")
        seconds = []
        for step in range(steps):
            start = time.process_time()
            micro_batch_at(stream, order, sample=step * rows, rows=rows)
            seconds.append(time.process_time() - start)
        passes.append(seconds)
    _, checked, known = passes
    n_first = 10  # steps in which most blocks are first read
    checks = sum(checked[:n_first]) - sum(known[:n_first])
    print(
        f"{stream.n_tokens:,} ids; reading a batch takes {1e3 * sum(known) / steps:.3f} ms; the "
        f"checks take {1e3 * checks:.2f} ms of the first {n_first} steps"
    )


if __name__ == "__main__":
    main()
