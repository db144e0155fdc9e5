"""Training tokens a second and memory: ours beside nanoGPT, transformers and litgpt, by turns.

python benchmarks/throughput.py --nanogpt CHECKOUT --litgpt CHECKOUT [--rounds 5] [--compiled]

All train the same GPT-2 (d 384, 6 layers, T 256) with the same batch in float32, over a vocabulary
of 4,096 and of 50,257; `contestants.py` says what each does. A round gives everybody some steps,
one after the other; a ratio is one of a round, so that what else the machine does falls out of it.
The share of the ceiling is that of what the same two cores do in the best of the three kinds of
matrix product at the model's own shapes, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from contestants import Shape
from rows import OURS, Row, rows_of, table

HERE = Path(__file__).resolve().parent


class Contestant:
    """A process that makes steps when it is told to."""

    def __init__(self, name: str, shape: Shape, path: str | None) -> None:
        self.name, self.shape = name, shape
        paths = [path, os.environ.get("PYTHONPATH")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "contestants.py"), name, shape.to_json()],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def _ask(self, line: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} did not answer; run contestants.py by hand to see why")
        return float(answer)

    def seconds(self, steps: int) -> float:
        return self._ask(str(steps))

    def finish(self) -> float:
        """Its peak memory, in bytes."""
        peak = self._ask("")
        self._process.wait()
        return peak


def ceiling(shape: Shape) -> float:
    """FLOP/s of the best kind of product at the feed-forward layer's shapes: X W^T, X W, X^T Y."""
    import torch

    torch.set_num_threads(shape.threads)
    rows, narrow, wide = shape.batch_tokens, shape.d_model, 4 * shape.d_model
    x, y = torch.randn(rows, narrow), torch.randn(rows, wide)
    w = torch.randn(wide, narrow)
    best = 0.0
    for product in (lambda: x @ w.T, lambda: y @ w, lambda: y.T @ x):
        product()
        for _ in range(10):
            began = time.perf_counter()
            product()
            best = max(best, 2 * rows * narrow * wide / (time.perf_counter() - began))
    return best


def compare(
    shape: Shape, paths: dict[str, str | None], *, rounds: int, steps: int
) -> Iterator[Row]:
    everybody = {name: Contestant(name, shape, path) for name, path in paths.items()}
    for each in everybody.values():
        each.seconds(2)  # caches, memory, compilers
    per_second: dict[str, list[float]] = {name: [] for name in everybody}
    ceilings = []
    for _ in range(rounds):
        ceilings.append(ceiling(shape))
        for name, each in everybody.items():
            per_second[name].append(steps * shape.batch_tokens / each.seconds(steps))
    peaks = {name: each.finish() for name, each in everybody.items()}
    ours = per_second[OURS]
    shares = [
        speed * shape.flops_per_token() / most for speed, most in zip(ours, ceilings, strict=True)
    ]
    used = f"{statistics.median(shares):.0%} of {statistics.median(ceilings) / 1e9:.0f} GFLOP/s"
    how = "compiled" if shape.compiled else "eager"
    what = f"training, vocabulary {shape.vocab_size:,}, {how}"
    yield from rows_of(what, "tokens/s", per_second, memory=peaks, notes={OURS: used})


def measure(
    *, nanogpt: str | None, litgpt: str | None, rounds: int, steps: int = 3, compiled: bool = False
) -> Iterator[Row]:
    paths = {OURS: None, "transformers": None}
    paths |= {"nanoGPT": nanogpt} if nanogpt else {}
    paths |= {"litgpt": litgpt} if litgpt else {}
    for vocab_size in (4096, 50_257):
        shape = Shape(compiled=compiled, vocab_size=vocab_size)
        yield from compare(shape, paths, rounds=rounds, steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--litgpt", help="a checkout of litgpt, or a path with its packages too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each, in a round")
    parser.add_argument("--compiled", action="store_true", help="by torch.compile, everybody")
    asked = parser.parse_args()
    print("\n".join(table(measure(**vars(asked)))))


if __name__ == "__main__":
    main()
