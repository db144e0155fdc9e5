"""Measures round by round, and how much of the processors other programs used meanwhile.

Counted are clock ticks of /proc, on Linux only: those in which a core was busy or was taken by the
host of a virtual machine (steal), without those of this process and of all that it started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

# Of all cores. Of two it is a tenth of one, and a step whose two threads wait for each other takes
# a tenth longer, which is what rounds differ by on an idle machine too. Much less could not be told
# apart: the ticks of all processes came to those of the machine within 2 % of a second, 1 % of 3.
LIMIT = 0.05

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Ticks:
    """Clock ticks of all cores since the machine started."""

    whole: int
    """idle ones too"""
    busy: int
    """of anybody, and stolen ones"""
    ours: int
    """of a process and of all that it started, what has ended included"""


def read_ticks(proc: Path = Path("/proc"), pid: int | None = None) -> Ticks | None:
    """None where there is no such folder."""
    try:
        of_cores = [int(n) for n in (proc / "stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    parents, used = {}, {}
    for path in proc.glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            # After its name, which may hold brackets: the fifteenth field on are its own seconds as
            # a user and in the system, and both of its children that it has waited for.
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            each = int(path.parent.name)
            parents[each], used[each] = int(fields[1]), sum(map(int, fields[11:15]))
    ours = {pid or os.getpid()}
    while more := {each for each, parent in parents.items() if parent in ours} - ours:
        ours |= more
    _, _, _, idle, waits_for_disk, *_ = of_cores
    return Ticks(
        whole=sum(of_cores),
        busy=sum(of_cores) - idle - waits_for_disk,
        ours=sum(used.get(each, 0) for each in ours),
    )


def share_of_others(before: Ticks | None, after: Ticks | None) -> float | None:
    """None where it was not measured."""
    if before is None or after is None or after.whole <= before.whole:
        return None
    others = after.busy - before.busy - (after.ours - before.ours)
    return max(0.0, others / (after.whole - before.whole))


class Watch:
    """Begins when it is made."""

    def __init__(self) -> None:
        self._before = read_ticks()

    def others(self) -> float | None:
        return share_of_others(self._before, read_ticks())


def percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.0f} %"


def quiet_rounds(
    one_round: Callable[[int], Found], *, rounds: int
) -> tuple[list[Found], float | None]:
    """What each round found, and the most that others used in one of them.

    A round (it is told its number) in which they used more than LIMIT is measured again; that may
    happen to a third of the rounds. With one more the machine is busy: the disturbed rounds are
    returned, and their share, by which whoever writes a table leaves them out.
    """
    quiet: list[tuple[Found, float | None]] = []
    disturbed: list[tuple[Found, float | None]] = []
    repeats = -(-rounds // 3)
    while len(quiet) < rounds and len(disturbed) <= repeats:
        watch = Watch()
        found = one_round(len(quiet))
        others = watch.others()
        is_disturbed = others is not None and others > LIMIT
        (disturbed if is_disturbed else quiet).append((found, others))
        if is_disturbed:
            print(f"a round in which others used {percent(others)}", file=sys.stderr, flush=True)
    kept = quiet if len(quiet) == rounds else disturbed
    shares = [others for _, others in kept if others is not None]
    return [found for found, _ in kept], max(shares, default=None)
