"""All benchmarks in one go, into a page and a picture: what `make bench` runs.

python benchmarks/everything.py [--peers FOLDER] [--shakespeare FILE] [--rounds 3] [--long]

FOLDER has checkouts of the peers, nanoGPT and litgpt (and what litgpt imports as well, in a
folder `site`); what is missing is left out, as is what needs a text that is not given. `--long`
adds what is compiled, and corpora of up to 2.5 GB. A measurement that other programs disturbed is
left out of both (`quiet.py`); where all are, page and picture stay as they were.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

import corpus_size
import generating
import shakespeare
import starting
import throughput
import waiting
from quiet import percent
from rows import OURS, Row, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "explanation" / "benchmarks.md"
PICTURE = PAGE.with_suffix(".svg")


def parts(args: argparse.Namespace) -> Iterator[tuple[str, Iterator[Row]]]:
    """What is measured one after the other, when its rows are taken."""
    nanogpt = _checkout(args.peers, "nanoGPT")
    litgpt = _checkout(args.peers, "litgpt")
    if litgpt:
        litgpt = f"{litgpt}{os.pathsep}{(args.peers / 'site').resolve()}"
    yield "starting", starting.measure(rounds=args.rounds)
    for compiled in (False, True) if args.long else (False,):
        how = {"rounds": args.rounds + 2, "steps": 1, "compiled": compiled}
        yield "throughput", throughput.measure(nanogpt=nanogpt, litgpt=litgpt, **how)
    yield "waiting", waiting.measure(rounds=4 * args.rounds)
    yield "generating", generating.measure(nanogpt=nanogpt, rounds=args.rounds)
    if args.long:
        yield "corpus_size", corpus_size.measure(rounds=args.rounds + 4)
    if nanogpt and args.shakespeare:
        # One fewer: nanoGPT takes two minutes a round, and the ratio is far from 1.
        how = {"rounds": max(1, args.rounds - 1), "far": args.long}
        race = shakespeare.measure(nanogpt=Path(nanogpt), text=args.shakespeare, **how)
        yield "shakespeare", race


def _checkout(peers: Path | None, name: str) -> str | None:
    """Return the absolute path of a peer's checkout, or None."""
    return str((peers / name).resolve()) if peers and (peers / name).is_dir() else None


def picture(bars: list[Row]) -> str:
    """How many times as fast ours is, on a logarithmic scale."""
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


def write_page(rows: list[Row], *, command: str, minutes: float) -> None:
    """Put the rows that nobody disturbed, and the names of the others, in the place of the figures
    of last time."""
    quiet = [row for row in rows if not row.is_disturbed]
    if not quiet:
        left_out = "\n".join(list(table(rows))[2:])
        raise SystemExit(f"{PAGE.name} keeps its figures, since the machine is busy:\n{left_out}")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    figures = [f"`{command}` on {machine}, in {minutes:.0f} minutes:", ""]
    if bars := [row for row in quiet if row.times_as_fast and not row.who.startswith(OURS)]:
        PICTURE.write_text(picture(bars))
        figures += [f"![how many times as fast]({PICTURE.name})", ""]
    shares = [row.others for row in quiet if row.others is not None]
    used = f"at most {percent(max(shares))} in a round" if shares else "not measured"
    figures += [*table(rows), "", f"What other programs used of the processors meanwhile: {used}."]
    begin, end = "<!-- figures -->\n", "<!-- /figures -->\n"
    before, _, rest = (PAGE.read_text() if PAGE.is_file() else "").partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text("\n".join([f"{before}{begin}", *figures, "", f"{end}{after}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, help="a folder with checkouts of the peers")
    parser.add_argument("--shakespeare", type=Path, help="tinyshakespeare, a plain file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()
    rows, began = [], time.perf_counter()
    for name, part in parts(args):
        part_began = time.perf_counter()
        for row in part:
            rows.append(row)
            print(list(table([row]))[-1], file=sys.stderr, flush=True)
        print(f"{name}: {_minutes_since(part_began):.1f} minutes", file=sys.stderr, flush=True)
    words = ["make", "bench-full" if args.long else "bench", "PEERS=FOLDER", "SHAKESPEARE=FILE"]
    write_page(rows, command=shlex.join(words), minutes=_minutes_since(began))


def _minutes_since(began: float) -> float:
    return (time.perf_counter() - began) / 60


if __name__ == "__main__":
    main()
