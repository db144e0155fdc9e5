"""How threads that wait for each other share the cores with whatever else runs.

python benchmarks/waiting.py [--rounds 15]

A process holds the recipe `english` with as many threads as there are cores, once as torch's own
OpenMP has it, once with the few spins that `pretrain` asks for; they make a step each by turns, on
a machine that has nothing else to do, and next to a program that never rests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from line_process import LineProcess
from quiet import quiet_rounds
from rows import OURS, Row, rows_of, table

from pretrain.data.preparation import prepare
from pretrain.machine import SPINS, usable_cores

SERVER = str(Path(__file__).with_name("corpus_size.py"))
VARIABLES = {OURS: {"GOMP_SPINCOUNT": str(SPINS)}, "torch's own": {}}


def measure(*, rounds: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "prepared"
        prepare("bundled", folder)
        words = [SERVER, "--serve", str(folder), str(usable_cores())]
        everybody = {
            who: LineProcess(words, {**os.environ, **more}) for who, more in VARIABLES.items()
        }
        for process in everybody.values():
            process.ask()
        for busy in (False, True):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            speeds, others = quiet_rounds(
                lambda _: {who: process.ask()[0] for who, process in everybody.items()},
                rounds=rounds,
            )
            if other:
                other.kill()
                other.wait()
            what = "next to a busy program" if busy else "alone"
            yield from rows_of(f"threads that wait, {what}", "tokens/s", speeds, others=others)
        for process in everybody.values():
            process.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    print("\n".join(table(measure(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
