"""What `own_text.py` measured, as tables: means over seeds with their standard error, compared with
the best of counting, and what more minutes change."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quiet import percent

PPMD, KNESER_NEY = "PPMd, order 6", "Kneser-Ney"


@dataclass(frozen=True, kw_only=True)
class Ran:
    text: str
    """its name, with a checksum of the part that was taken"""
    size: str
    minutes: float
    who: str
    setting: str
    seed: int
    bits_per_byte: float
    """of the held-out text"""
    seconds: float
    """of the steps, from the first to the last"""
    process_seconds: float
    """of the process that trained"""
    memory: int
    """most that this process held, in bytes"""
    disk: int
    """of the run directory, in bytes"""
    kneser_ney: float | None = None
    """bits/byte of the better of the run's own two tables: over its tokens, and over bytes"""
    others: float | None = None
    """share of the processors that others used while it was measured"""

    @property
    def key(self) -> tuple[object, ...]:
        return self.text, self.size, self.minutes, self.who, self.setting, self.seed


Cells = dict[tuple[str, str, float, str], list[Ran]]
"""The runs of each text, size, minutes, and who; with the setting that was best for one seed."""


def cells_of(ran: Iterable[Ran]) -> Cells:
    cells: Cells = {}
    for each in ran:
        cells.setdefault((each.text, each.size, each.minutes, each.who), []).append(each)
    return {cell: _of_best_setting(runs) for cell, runs in cells.items()}


def _of_best_setting(runs: list[Ran]) -> list[Ran]:
    """All settings have run on the first seed, the best of them on the others."""
    first = [run for run in runs if run.seed == runs[0].seed]
    best = min(first, key=lambda run: run.bits_per_byte)
    return [run for run in runs if run.setting == best.setting]


def counting(cells: Cells, text: str, size: str) -> dict[str, float]:
    """Bits/byte of Kneser-Ney and PPMd on a text."""
    runs = [run for cell, own in cells.items() for run in own if cell[:2] == (text, size)]
    tables = [run.kneser_ney for run in runs if run.kneser_ney is not None]
    counted = {KNESER_NEY: min(tables)} if tables else {}
    return counted | {run.who: run.bits_per_byte for run in runs if run.who == PPMD}


def table(cells: Cells) -> Iterator[str]:
    """Lines of a table in Markdown. Seconds are means; memory, disk and what others used are the
    most of all seeds."""
    yield (
        "| text | size | minutes | who | bits/byte | next to the best of counting | memory "
        "| disk | seconds used / given | process | others used of the processors | |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for text, size in dict.fromkeys(cell[:2] for cell in cells):
        counted = counting(cells, text, size)
        least = min(counted.values())
        for who, bits in counted.items():
            next_to = f"{bits / least - 1:+.1%}"
            yield f"| {text} | {size} | | {who} | {bits:.3f} | {next_to} | | | | | | |"
        for (*where, minutes, who), runs in cells.items():
            if where != [text, size] or who == PPMD:
                continue
            values = [run.bits_per_byte for run in runs]
            memory, disk = max(run.memory for run in runs), max(run.disk for run in runs)
            others = max((run.others for run in runs if run.others is not None), default=None)
            used = statistics.mean(run.seconds for run in runs)
            whole = statistics.mean(run.process_seconds for run in runs)
            yield (
                f"| {text} | {size} | {minutes:g} | {who} | {with_error(values)} "
                f"| {statistics.mean(values) / least - 1:+.1%} | {memory / 1e6:,.0f} MB "
                f"| {disk / 1e6:,.0f} MB | {used:.1f} / {60 * minutes:g} s | {whole:.0f} s "
                f"| {percent(others)} | {runs[0].setting} |"
            )


def more_minutes(cells: Cells) -> Iterator[str]:
    """Lines of a table: a difference for each seed, and whether it is worse than its error."""
    yield "| text | size | who | minutes | bits/byte | |"
    yield "|---|---|---|---|---|---|"
    minutes = sorted({cell[2] for cell in cells} - {0})
    for text, size, who in dict.fromkeys((cell[0], cell[1], cell[3]) for cell in cells):
        for short, long in pairwise(minutes):
            before, after = (
                {run.seed: run.bits_per_byte for run in cells.get((text, size, each, who), ())}
                for each in (short, long)
            )
            if differences := [after[seed] - before[seed] for seed in before if seed in after]:
                yield (
                    f"| {text} | {size} | {who} | {long / short:g} times the minutes, {long:g} for "
                    f"{short:g} | {with_error(differences, '+')} | {verdict(differences)} |"
                )


def verdict(differences: Sequence[float]) -> str:
    mean, error = _mean_and_error(differences)
    if math.isnan(error):
        return f"{'**worse**' if mean > 0 else 'not worse'}, one seed"
    return "**worse**" if mean > error else "better" if mean < -error else "within its error"


def with_error(values: Sequence[float], sign: str = "") -> str:
    mean, error = _mean_and_error(values)
    return f"{mean:{sign}.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The standard error of one value is unknown: NaN."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.mean(values), error
