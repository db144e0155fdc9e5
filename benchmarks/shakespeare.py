"""How long until the characters of tinyshakespeare are learned: to the loss of nanoGPT's README on
a CPU, and to 1.55 nats, by a network alone; counts of up to seven characters reach 1.543.

python benchmarks/shakespeare.py --nanogpt CHECKOUT --text tinyshakespeare.txt [--rounds 3]

In the first race nanoGPT runs its README's CPU recipe, unmodified, in the second (--far) another
setting, which learns faster (docs/notebook), for a time that we have; where it does not come to
1.55 nats, its time is less than what it would need. Ours runs the recipe `characters` for so few
steps that it is there.

Both get the whole machine, by turns. Both are scored over the whole last tenth of the text, each
character once: ours by its summary.json, nanoGPT's checkpoint here, in windows of its context that
do not overlap. Times are of whole processes, from the command to the prompt; nanoGPT's preparation
of the text is not counted, ours is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quiet import quiet_rounds
from rows import OURS, Row, rows_of, table


@dataclass(frozen=True, kw_only=True)
class Race:
    to: str
    nanogpt: str
    """words of its train.py"""
    steps: int
    """ours"""
    published: str = ""
    """the loss that its README names, by its own estimate from a part of the held-out text"""


# Seconds of the process, seconds of its steps, and nats a character.
Figures = tuple[float, float, float]
ON_A_CPU = "config/train_shakespeare_char.py --device=cpu --eval_iters=20 --log_interval=1 "
RACES = (
    Race(
        to="the loss of nanoGPT's README",
        nanogpt=ON_A_CPU + "--compile=False --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
        "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0",
        steps=34,
        published="1.88",
    ),
    Race(
        to="1.55 nats",
        nanogpt=ON_A_CPU + "--compile=False --block_size=128 --batch_size=16 --n_layer=4 "
        "--n_head=4 --n_embd=128 --max_iters=3000 --lr_decay_iters=3000 --dropout=0.0 "
        "--learning_rate=3e-3 --min_lr=3e-4 --eval_interval=3000",
        steps=300,
    ),
)
COMMAND = "train characters --train.evaluate_every 1000000".split()
# Run by nanoGPT's side, with its own model.
SCORE = """
import numpy, torch
from model import GPT, GPTConfig
kept = torch.load("out-shakespeare-char/ckpt.pt", map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**kept["model_args"]))
model.load_state_dict(kept["model"])
model.eval()
T = model.config.block_size
ids = torch.from_numpy(numpy.fromfile("data/shakespeare_char/val.bin", numpy.uint16).astype(int))
nats = 0.0
with torch.no_grad():
    for start in range(0, len(ids) - 1, T):
        x, y = ids[start : start + T], ids[start + 1 : start + T + 1]
        nats += float(model(x[None, : len(y)], y[None])[1]) * len(y)
print(nats / (len(ids) - 1))
"""


def timed(command: list[str], *, cwd: Path, **environment: str) -> tuple[float, str]:
    """Seconds of a whole process, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return time.perf_counter() - began, done.stdout


def by_nanogpt(folder: Path, words: str) -> tuple[Figures, float]:
    """Its figures, and the nats a character that it estimates itself at its last evaluation."""
    shutil.rmtree(folder / "out-shakespeare-char", ignore_errors=True)
    seconds, said = timed([sys.executable, "train.py", *words.split()], cwd=folder)
    # The line of a step says its time; that of a step with an evaluation has both.
    steps = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", said)]
    typical = statistics.median(steps)
    training = sum(min(ms, 3 * typical) for ms in steps) / 1000
    loss = float(timed([sys.executable, "-c", SCORE], cwd=folder)[1].split()[-1])
    return (seconds, training, loss), float(re.findall(r"val loss ([\d.]+)", said)[-1])


def by_ours(text: Path, run: Path, *, steps: int, seed: int) -> Figures:
    words = [*COMMAND, "--data.source", str(text.resolve()), "--run", str(run), "--json"]
    words += ["--train.steps", str(steps), "--train.seed", str(seed)]
    # An empty cache: the text is prepared again.
    command = [sys.executable, "-m", "pretrain", *words]
    seconds, said = timed(command, cwd=run.parent, PRETRAIN_CACHE=str(run) + "-cache")
    summary = json.loads(said)
    return seconds, summary["train_seconds"], summary["val_nats_per_token"]


def measure(*, nanogpt: Path, text: Path, rounds: int, far: bool = False) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        peer = shutil.copytree(nanogpt, Path(name) / "nanoGPT")
        shutil.copy(text, peer / "data/shakespeare_char/input.txt")
        timed([sys.executable, "data/shakespeare_char/prepare.py"], cwd=peer)
        for race in RACES if far else RACES[:1]:
            yield from _run(race, peer, text, rounds=rounds)


def _run(race: Race, peer: Path, text: Path, *, rounds: int) -> Iterator[Row]:
    def one_round(number: int) -> tuple[dict[str, Figures], float]:
        figures, estimate = by_nanogpt(peer, race.nanogpt)
        with tempfile.TemporaryDirectory() as name:
            ours = by_ours(text, Path(name) / "run", steps=race.steps, seed=number + 1)
        return {OURS: ours, "nanoGPT": figures}, estimate

    measured, others = quiet_rounds(one_round, rounds=rounds)
    found, estimates = zip(*measured, strict=True)
    losses = {who: [each[who][-1] for each in found] for who in found[0]}
    assert all(math.isfinite(loss) for each in losses.values() for loss in each)
    spans = {who: f"{min(each):.3f} to {max(each):.3f} nats" for who, each in losses.items()}
    if race.published:
        own = f"{min(estimates):.2f} to {max(estimates):.2f}"
        spans["nanoGPT"] += f"; by its own estimate {own}, its README says {race.published}"
    for place, what in enumerate(("whole process", "steps alone")):
        seconds = [{who: figures[place] for who, figures in each.items()} for each in found]
        what = f"tinyshakespeare to {race.to}, {what}"
        yield from rows_of(what, "s", seconds, others=others, notes=spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare, a plain file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--far", action="store_true", help="the second race too, ten minutes a round"
    )
    args = parser.parse_args()
    print("\n".join(table(measure(**vars(args)))))
    for race in RACES if args.far else RACES[:1]:
        print("pretrain", *COMMAND, f"--train.steps {race.steps} --data.source TEXT")
        print("nanoGPT: python train.py", race.nanogpt)


if __name__ == "__main__":
    main()
