"""Training tokens a second and memory: ours, nanoGPT, transformers and litgpt, by turns.

python benchmarks/throughput.py --nanogpt CHECKOUT --litgpt CHECKOUT [--rounds 5] [--compiled]
    [--device cuda]

All train the same GPT-2 (d 384, 6 layers, T 256) with the same batch in float32, over a vocabulary
of 4,096 and of 50,257; on a GPU the one of 124 million parameters (d 768, 12 layers, T 1024, V
50,257), in bfloat16, 131,072 tokens a step; `contestants.py` says what each does. A round gives
everybody some steps, one after the other; a ratio is one of a round, so that what else the machine
does falls out of it. The share of the ceiling is that of the best matrix product at the model's own
shapes, by whichever library, measured in the same rounds: what `pretrain train --profile` calls so.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contestants import Shape
from line_process import LineProcess
from quiet import quiet_rounds
from rows import OURS, Row, rows_of, table

from pretrain.distributed import open_world
from pretrain.model.config import training_flops
from pretrain.train.config import TrainConfig
from pretrain.train.profile import ceiling_flops

HERE = Path(__file__).resolve().parent
GPT2_ON_A_GPU: dict[str, Any] = {
    "d_model": 768,
    "n_layers": 12,
    "n_heads": 12,
    "context": 1024,
    "vocab_size": 50_257,
    "batch_tokens": 1 << 17,
    "micro_batch_tokens": 1 << 15,
    "device": "cuda",
}


def contestant(name: str, shape: Shape, path: str | None) -> LineProcess:
    paths = [path, os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "HF_HUB_OFFLINE": "1",
    }
    return LineProcess([str(HERE / "contestants.py"), name, shape.to_json()], environment)


def compare(
    shape: Shape, paths: dict[str, str | None], *, rounds: int, steps: int
) -> Iterator[Row]:
    model, world = shape.model(), open_world(shape.device, threads=shape.threads)
    rows = min(shape.rows, shape.micro_batch_tokens // shape.context)
    train = TrainConfig(steps=1, precision=shape.precision, micro_batch_rows=rows)
    everybody = {name: contestant(name, shape, path) for name, path in paths.items()}
    for each in everybody.values():
        each.ask("3")  # caches, memory, compilers

    def one_round(_: int) -> tuple[float, dict[str, float]]:
        ceiling, tokens = ceiling_flops(model, train, world), steps * shape.batch_tokens
        return ceiling, {name: tokens / each.ask(str(steps)) for name, each in everybody.items()}

    found, others = quiet_rounds(one_round, rounds=rounds)
    peaks = {name: each.ask() for name, each in everybody.items()}
    ceilings, speeds = zip(*found, strict=True)
    per_token = training_flops(model, vocab_size=shape.vocab_size)
    shares = [each[OURS] * per_token / most for most, each in found]
    used = f"{statistics.median(shares):.0%} of {statistics.median(ceilings) / 1e9:,.0f} GFLOP/s"
    how = "compiled" if shape.compiled else "eager"
    what = f"training, vocabulary {shape.vocab_size:,}, {how}"
    notes = {OURS: used}
    yield from rows_of(what, "tokens/s", speeds, others=others, memory=peaks, notes=notes)


def measure(
    *,
    nanogpt: str | None,
    litgpt: str | None,
    rounds: int,
    steps: int = 3,
    compiled: bool = False,
    device: str = "cpu",
) -> Iterator[Row]:
    paths: dict[str, str | None] = {OURS: None, "transformers": None}
    paths |= {"nanoGPT": nanogpt} if nanogpt else {}
    paths |= {"litgpt": litgpt} if litgpt else {}
    shapes = [Shape(compiled=compiled, vocab_size=vocab_size) for vocab_size in (4096, 50_257)]
    if device == "cuda":
        shapes = [Shape(compiled=compiled, **GPT2_ON_A_GPU)]
    for shape in shapes:
        yield from compare(shape, paths, rounds=rounds, steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--litgpt", help="a checkout of litgpt, or a path with its packages too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each, in a round")
    parser.add_argument("--compiled", action="store_true", help="by torch.compile, everybody")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    print("\n".join(table(measure(**vars(args)))))


if __name__ == "__main__":
    main()
