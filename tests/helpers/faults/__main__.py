"""`python -m faults short|ci|full [PART...] [--seed N] [--on FOLDER]`: run it, print the table.

Exit code 1 if a fault was not survived, or did not happen as planned. Files are in memory
(/dev/shm) if possible: a process that is killed leaves the same files on any disk, and what a disk
loses with its power is simulated by `crash_states`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from faults import (
    broken_savers,
    configs,
    corruption,
    crash_states,
    full_disks,
    injected,
    kills,
    resumes,
    rivals,
)
from faults.table import Row, Unrecovered, render, surroundings


@dataclass(frozen=True, slots=True)
class Size:
    """The size of each part."""

    kills: int
    torch_kills: int
    one_flip_in: int
    flips_for_others: int
    configs: int
    pairs_each: int
    train_kills: int
    one_signal_in: int
    one_config_in: int
    workers: int


SIZES = {
    "short": Size(40, 10, 20, 200, 2, 1, 3, 8, 7, 1),
    "ci": Size(10_000, 300, 1, 10_000, 20, 1, 40, 1, 1, 2),
    "full": Size(10_000, 300, 1, 10_000, 20, 25, 2_000, 1, 1, 2),
}


def _kills(scratch: Path, size: Size, seed: int) -> Iterator[Row]:
    yield kills.kill_the_saver(scratch, landed=size.kills, seed=seed, workers=size.workers)
    yield kills.kill_torch_save(scratch, landed=size.torch_kills, seed=seed)


def _crash_states(scratch: Path, size: Size, seed: int) -> Iterator[Row]:
    yield crash_states.enumerate_states(scratch)
    yield crash_states.compare_with_the_kernel(scratch)


def _broken_savers(scratch: Path, size: Size, seed: int) -> Iterator[Row]:
    yield from broken_savers.catch_all(scratch)


def _corruption(scratch: Path, size: Size, seed: int) -> Iterator[Row]:
    yield corruption.flip_bits(scratch, every=size.one_flip_in, seed=seed)
    yield corruption.damage_in_every_way(scratch)
    yield from corruption.flip_for_others(scratch, n=size.flips_for_others, seed=seed)


def _errors(scratch: Path, size: Size, seed: int) -> Iterator[Row]:
    yield injected.fail_every_call(scratch)
    yield injected.short_writes(scratch)
    yield injected.changed_bytes(scratch)


def _resumes(scratch: Path, size: Size, seed: int) -> Iterator[Row]:
    yield resumes.bitwise_pairs(
        scratch, each=size.pairs_each, configs=size.configs, seed=seed, workers=size.workers
    )
    yield resumes.random_kills(scratch, landed=size.train_kills, seed=seed, workers=size.workers)


def _disks(scratch: Path, size: Size, seed: int) -> Iterator[Row]:
    yield full_disks.limited_files(scratch)
    yield full_disks.no_more_open_files(scratch)
    yield from full_disks.full_disks(scratch)
    yield from full_disks.train_on_a_full_disk(scratch)


def _rivals(scratch: Path, size: Size, seed: int) -> Iterator[Row]:
    yield from rivals.run_all(scratch, every=size.one_signal_in)


def _configs(scratch: Path, size: Size, seed: int) -> Iterator[Row]:
    yield configs.reject_all(scratch, every=size.one_config_in)
    yield configs.reject_absurd_sizes(scratch)


PARTS: dict[str, Callable[[Path, Size, int], Iterator[Row]]] = {
    "crash-states": _crash_states,
    "broken-savers": _broken_savers,
    "errors": _errors,
    "corruption": _corruption,
    "disks": _disks,
    "kills": _kills,
    "resumes": _resumes,
    "rivals": _rivals,
    "configs": _configs,
}


def run_part(name: str, size: Size, *, seed: int, on: Path | None = None) -> Iterator[Row]:
    """Yield the rows of one part; a fault that was not survived is a row too."""
    with tempfile.TemporaryDirectory(dir=on, prefix="faults-") as scratch:
        try:
            yield from PARTS[name](Path(scratch), size, seed)
        except Unrecovered as error:
            yield Row(name, 1, 1, 0, f"NOT SURVIVED (seed {seed}): {error}")


def memory_folder() -> Path:
    """The fastest folder for files."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("part", nargs="*", choices=[[], *PARTS])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--on", type=Path, default=memory_folder(), metavar="FOLDER")
    arguments = parser.parse_args()
    # A process that forks must have no threads, and the numbers depend on their number.
    torch.set_num_threads(1)
    start_time = time.monotonic()
    rows: list[Row] = []
    for name in arguments.part or PARTS:
        start = time.monotonic()
        for row in run_part(name, SIZES[arguments.size], seed=arguments.seed, on=arguments.on):
            rows.append(row)
            print(f"  {render([row]).splitlines()[-1]}", file=sys.stderr, flush=True)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(surroundings(seed=arguments.seed, scratch=arguments.on))
    print(f"{time.monotonic() - start_time:.0f} s in all\n")
    print(render(rows))
    return int(not all(row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
