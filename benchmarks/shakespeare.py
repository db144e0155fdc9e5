"""How long until tinyshakespeare is learned as well as nanoGPT's README learns it on a CPU.

python benchmarks/shakespeare.py --nanogpt CHECKOUT --text tinyshakespeare.txt [--rounds 3]

nanoGPT runs its README's CPU recipe, unmodified; ours runs the recipe `characters` for so few steps
that it is still better. Both get the whole machine, by turns. Both are scored over the whole last
tenth of the text, each character once: ours by its summary.json, nanoGPT's checkpoint here, in
windows of its context that do not overlap. Times are of whole processes, from the command to the
prompt; nanoGPT's preparation of the text is not counted, ours is.
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
from pathlib import Path

README_RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
OURS = "train characters --train.evaluate_every 1000000".split()
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


def nanogpt(folder: Path) -> tuple[float, float, float]:
    """Seconds of the process, seconds of its steps, and nats a character."""
    shutil.rmtree(folder / "out-shakespeare-char", ignore_errors=True)
    seconds, said = timed([sys.executable, "train.py", *README_RECIPE], cwd=folder)
    # The line of a step says its time; that of a step with an evaluation has both.
    steps = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", said)]
    typical = statistics.median(steps)
    training = sum(min(ms, 3 * typical) for ms in steps) / 1000
    loss = float(timed([sys.executable, "-c", SCORE], cwd=folder)[1].split()[-1])
    return seconds, training, loss


def ours(text: Path, run: Path, *, steps: int, seed: int) -> tuple[float, float, float]:
    words = [*OURS, "--data.source", str(text.resolve()), "--run", str(run), "--json"]
    words += ["--train.steps", str(steps), "--train.seed", str(seed)]
    # An empty cache: the text is prepared anew.
    command = [sys.executable, "-m", "pretrain", *words]
    seconds, said = timed(command, cwd=run.parent, PRETRAIN_CACHE=str(run) + "-cache")
    summary = json.loads(said)
    return seconds, summary["train_seconds"], summary["val_nats_per_token"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare, a plain file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=34, help="of ours")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        peer = shutil.copytree(asked.nanogpt, scratch / "nanoGPT")
        shutil.copy(asked.text, peer / "data/shakespeare_char/input.txt")
        timed([sys.executable, "data/shakespeare_char/prepare.py"], cwd=peer)
        rows = []
        for seed in range(1, asked.rounds + 1):
            run = scratch / f"run-{seed}"
            both = nanogpt(peer), ours(asked.text, run, steps=asked.steps, seed=seed)
            rows.append(both)
            for who, (seconds, training, loss) in zip(("nanoGPT", "pretrain"), both, strict=True):
                figures = f"{seconds:7.1f} s, {training:6.1f} s of steps, {loss:.4f} nats"
                print(f"{who:9} {figures}", flush=True)
    assert all(math.isfinite(number) for pair in rows for row in pair for number in row)
    for what, place in (("whole process", 0), ("steps alone", 1)):
        ratios = sorted(theirs[place] / our[place] for theirs, our in rows)
        spread = f"({ratios[0]:.1f} to {ratios[-1]:.1f})"
        print(f"{what}: {statistics.median(ratios):.1f} times as fast {spread}")
    worse = [our[2] - theirs[2] for theirs, our in rows]
    print(f"ours minus theirs, nats a character: {max(worse):+.4f} at the worst")
    print("pretrain", " ".join(OURS), f"--train.steps {asked.steps} --data.source TEXT")
    print("nanoGPT: python train.py", " ".join(README_RECIPE))


if __name__ == "__main__":
    main()
