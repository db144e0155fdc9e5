"""All benchmarks in one go, into a page and a picture: what `make bench` runs.

python benchmarks/everything.py [--peers FOLDER] [--shakespeare FILE] [--rounds 3] [--long]

FOLDER has checkouts of the peers, nanoGPT and litgpt (and what litgpt imports as well, in a
folder `site`); what is missing is left out, as is what needs a text that is not given. `--long`
adds what is compiled, and corpora of up to 2.5 GB.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

import corpus_size
import generating
import shakespeare
import starting
import throughput
import waiting
from rows import OURS, Row, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "explanation" / "benchmarks.md"
PICTURE = PAGE.with_suffix(".svg")


def measured(args: argparse.Namespace) -> Iterator[Row]:
    nanogpt = _checkout(args.peers, "nanoGPT")
    litgpt = _checkout(args.peers, "litgpt")
    if litgpt:
        litgpt = f"{litgpt}{os.pathsep}{(args.peers / 'site').resolve()}"
    yield from starting.measure(rounds=args.rounds)
    for compiled in (False, True) if args.long else (False,):
        yield from throughput.measure(
            nanogpt=nanogpt, litgpt=litgpt, rounds=args.rounds + 2, steps=2, compiled=compiled
        )
    yield from waiting.measure(rounds=4 * args.rounds)
    yield from generating.measure(nanogpt=nanogpt, rounds=args.rounds)
    if args.long:
        yield from corpus_size.measure(rounds=args.rounds + 4)
    if nanogpt and args.shakespeare:
        # One fewer: nanoGPT takes two minutes a round, and the ratio is far from 1.
        rounds = max(1, args.rounds - 1)
        yield from shakespeare.measure(
            nanogpt=Path(nanogpt), text=args.shakespeare, rounds=rounds, far=args.long
        )


def _checkout(peers: Path | None, name: str) -> str | None:
    """Return the absolute path of a peer's checkout, or None."""
    return str((peers / name).resolve()) if peers and (peers / name).is_dir() else None


def picture(rows: list[Row]) -> str:
    """Bars of how many times as fast ours is, on a logarithmic scale."""
    bars = [row for row in rows if row.times_as_fast and not row.who.startswith(OURS)]
    height, left, width = 24, 420, 300
    most = max(max(row.times_as_fast) for row in bars)
    parts = []
    for i, row in enumerate(bars):
        ratio, y = statistics.median(row.times_as_fast), 20 + i * height
        # 1/2 stands at the left, the largest at the right.
        share = _logarithm(2 * ratio) / _logarithm(2 * most)
        parts.append(
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">'
            f"{escape(row.what)}, {escape(row.who)}</text>"
            f'<rect x="{left}" y="{y + 2}" width="{max(1, width * share):.0f}" height="16" '
            f'fill="#4477aa"/><text x="{left + width * share + 6:.0f}" y="{y + 14}">'
            f"{ratio:.{1 if ratio >= 10 else 2}f}</text>"
        )
    one = left + width * _logarithm(2) / _logarithm(2 * most)
    end = 20 + len(bars) * height
    parts.append(
        f'<line x1="{one:.0f}" y1="16" x2="{one:.0f}" y2="{end}" stroke="black"/>'
        f'<text x="{one:.0f}" y="12" text-anchor="middle">as fast</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 60}" height="{end + 8}" '
        f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n'
    )


def _logarithm(x: float) -> float:
    return math.log(max(x, 1.01))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, help="a folder with checkouts of the peers")
    parser.add_argument("--shakespeare", type=Path, help="tinyshakespeare, a plain file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()
    rows = []
    for row in measured(args):
        rows.append(row)
        print(list(table([row]))[-1], file=sys.stderr, flush=True)
    words = ["make", "bench-full" if args.long else "bench", "PEERS=FOLDER", "SHAKESPEARE=FILE"]
    text = PAGE.read_text() if PAGE.is_file() else ""
    begin, end = "<!-- figures -->\n", "<!-- /figures -->\n"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    shown = f"![how many times as fast]({PICTURE.name})"
    figures = "\n".join([f"`{shlex.join(words)}` on {machine}:", "", shown, "", *table(rows), ""])
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n{figures}\n{end}{after}")
    PICTURE.write_text(picture(rows))


if __name__ == "__main__":
    main()
