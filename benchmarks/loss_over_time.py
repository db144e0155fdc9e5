"""Draw held-out loss over wall-clock time: ours next to nanoGPT, same processor, same text.

python benchmarks/loss_over_time.py --nanogpt CHECKOUT --text tinyshakespeare.txt [--out FILE.svg]

Each trains alone on the whole machine, from the command on: nanoGPT its README's recipe for a CPU
(its own estimate of the held-out loss, 20 batches every 100 iterations), ours the recipe
`characters` (a fixed part of the held-out text every 20 steps; preparing the text is included).
Both train in float32. The picture is docs/images/loss-over-time.svg; its points stand in a comment
at its end. It is not drawn where others used more of the processors meanwhile than `quiet.LIMIT`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quiet import LIMIT, Watch, percent

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "loss-over-time.svg"
NANOGPT = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--eval_interval=100 --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
    "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
# nanoGPT has float32 on a CPU, whatever the processor has; so has ours then.
OURS = "-m pretrain train characters --train.evaluate_every 20 --train.precision fp32".split()
COLORS = {"pretrain": "#0b6e4f", "nanoGPT": "#b3541e"}

Curve = list[tuple[float, float]]
"""(seconds since the command, held-out nats a character)"""


def main() -> None:
    """Train both, write the picture, print where each ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    watch = Watch()
    with tempfile.TemporaryDirectory() as name:
        curves = {
            "pretrain": run_ours(arguments.text.resolve(), Path(name) / "run"),
            "nanoGPT": run_nanogpt(arguments.nanogpt, arguments.text, Path(name) / "nanoGPT"),
        }
    if (others := watch.others()) is not None and others > LIMIT:
        raise SystemExit(f"{arguments.out} is not drawn: others used {percent(others)} meanwhile")
    arguments.out.write_text(picture(curves), encoding="utf-8")
    for who, curve in curves.items():
        print(f"{who}: {curve[-1][1]:.3f} nats a character after {curve[-1][0]:.0f} s")


def run_nanogpt(checkout: Path, text: Path, folder: Path) -> Curve:
    """Train nanoGPT in a copy of its checkout; return its evaluations."""
    shutil.copytree(checkout, folder)
    shutil.copy(text, folder / "data/shakespeare_char/input.txt")
    prepare = [sys.executable, "data/shakespeare_char/prepare.py"]
    subprocess.run(prepare, cwd=folder, check=True, capture_output=True)
    curve: Curve = []
    start = time.perf_counter()
    command = [sys.executable, "-u", *NANOGPT]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line):
                curve.append((time.perf_counter() - start, float(match[1])))
    if process.returncode:
        raise SystemExit(f"nanoGPT ended with exit code {process.returncode}")
    return curve


def run_ours(text: Path, run: Path) -> Curve:
    """Train the recipe `characters`; return its evaluations as they reach metrics.jsonl."""
    start = time.perf_counter()
    command = [sys.executable, *OURS, "--data.source", str(text), "--run", str(run)]
    curve: Curve = []
    environment = os.environ | {"PRETRAIN_CACHE": f"{run}-cache"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        metrics = run / "metrics.jsonl"
        while process.poll() is None:
            time.sleep(0.1)
            lines = metrics.read_text().splitlines() if metrics.is_file() else []
            losses = [
                record["val_nats_per_token"]
                for record in map(json.loads, lines)
                if record["kind"] == "evaluate"
            ]
            curve += [(time.perf_counter() - start, loss) for loss in losses[len(curve) :]]
    if process.returncode:
        raise SystemExit(f"pretrain ended with exit code {process.returncode}")
    return curve


def picture(curves: dict[str, Curve]) -> str:
    """Draw the curves as SVG, time from 0, loss from just below the lowest to 3.3 nats."""
    left, top, width, height = 60, 20, 600, 300
    last = max(curve[-1][0] for curve in curves.values())
    lowest = min(loss for curve in curves.values() for _, loss in curve) - 0.1
    highest = 3.3

    def x(seconds: float) -> float:
        return left + width * seconds / last

    def y(loss: float) -> float:
        return top + height * (highest - min(loss, highest)) / (highest - lowest)

    parts = [f'<rect width="{left + width + 30}" height="{top + height + 60}" fill="white"/>']
    for tick in range(0, int(last) + 1, 10):
        parts.append(
            f'<text x="{x(tick):.0f}" y="{top + height + 18}" text-anchor="middle">{tick}</text>'
        )
    for tenths in range(int(lowest * 10) + 1, int(highest * 10) + 1, 2):
        at = y(tenths / 10)
        parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
            f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{tenths / 10:.1f}</text>'
        )
    for row, (who, curve) in enumerate(curves.items()):
        points = " ".join(f"{x(seconds):.1f},{y(loss):.1f}" for seconds, loss in curve)
        color = COLORS[who]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(
            f'<text x="{left + width - 8}" y="{top + 18 + 18 * row}" text-anchor="end" '
            f'fill="{color}">'
            f"{who}: {curve[-1][1]:.3f} after {curve[-1][0]:.0f} s</text>"
        )
    parts.append(
        f'<text x="{left + width / 2:.0f}" y="{top + height + 44}" text-anchor="middle">'
        "seconds since the command (tinyshakespeare, two CPU cores)</text>"
        f'<text x="16" y="{top + height / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 16 {top + height / 2:.0f})">held-out nats a character</text>'
    )
    rounded = {w: [(round(s, 1), round(n, 4)) for s, n in curve] for w, curve in curves.items()}
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" '
        f'height="{top + height + 60}" font-family="sans-serif" font-size="13">'
        f"{''.join(parts)}<!-- {json.dumps(rounded)} --></svg>\n"
    )


if __name__ == "__main__":
    main()
