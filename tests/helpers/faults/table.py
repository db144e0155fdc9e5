"""The table of the suite: a row for each kind of fault, with all that is needed to repeat it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch


class Unrecovered(Exception):
    """A fault that was not survived; the message names it, with its seed and its case."""


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of fault."""

    fault: str
    injected: int
    """faults that were tried"""
    landed: int
    """the number of these that happened where and when they were planned; only they count"""
    survived: int
    note: str = ""
    ours: bool = True
    """False for code of other projects, which is shown for comparison and may fail"""

    @property
    def passed(self) -> bool:
        return not self.ours or 0 < self.landed == self.survived


def render(rows: Iterable[Row]) -> str:
    lines = ["| fault | injected | landed | survived | |", "|---|--:|--:|--:|---|"]
    for row in rows:
        numbers = f"{row.injected:,} | {row.landed:,} | {row.survived:,}"
        lines.append(f"| {row.fault} | {numbers} | {row.note} |")
    return "\n".join(lines)


def surroundings(*, seed: int, scratch: Path) -> str:
    """Seed, commit and machine, in a line each."""
    return (
        f"seed {seed}; commit {_commit()}\n"
        f"{_processor()}, {platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, 1 thread; "
        f"files on {_file_system(scratch)}"
    )


def _commit() -> str:
    here = Path(__file__).parent
    args = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(args, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _file_system(folder: Path) -> str:
    """The type of a folder's file system, from /proc/mounts."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "an unknown file system"
    inside = [(len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    return max(inside)[1] if inside else "an unknown file system"
