"""A measured figure, and a table of them: medians with their lowest and highest, and how many times
as fast ours is, a ratio of each round. What others disturbed is left out, and named below."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quiet import LIMIT, percent

OURS = "pretrain"


@dataclass(frozen=True, kw_only=True)
class Row:
    what: str
    who: str
    unit: str
    values: tuple[float, ...]
    """one a round"""
    others: float | None
    """most of the processors that others used in a round; None where it was not measured"""
    times_as_fast: tuple[float, ...] = ()
    """ours over it, one a round, sorted"""
    memory: float | None = None
    """most that its process held, in bytes"""
    note: str = ""

    @property
    def is_disturbed(self) -> bool:
        return self.others is not None and self.others > LIMIT


def rows_of(
    what: str,
    unit: str,
    rounds: Sequence[Mapping[str, float]],
    *,
    others: float | None,
    memory: dict[str, float] | None = None,
    notes: dict[str, str] | None = None,
) -> list[Row]:
    """A row for each contestant. Seconds are better the fewer, all other units the more."""
    rows = []
    for who in rounds[0]:
        pairs = [(each[OURS], each[who]) for each in rounds]
        ratios = [b / a if unit == "s" else a / b for a, b in pairs]
        rows.append(
            Row(
                what=what,
                who=who,
                unit=unit,
                values=tuple(value for _, value in pairs),
                others=others,
                times_as_fast=() if who == OURS else tuple(sorted(ratios)),
                memory=(memory or {}).get(who),
                note=(notes or {}).get(who, ""),
            )
        )
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: Sequence[float]) -> str:
    middle = _number(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({_number(min(values))} to {_number(max(values))})"


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of a table in Markdown, and a line for each measurement that is left out of it."""
    rows = list(rows)
    yield "| what | who | median (lowest to highest) | pretrain, times as fast | memory | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        if row.is_disturbed:
            continue
        memory = "" if row.memory is None else f"{row.memory / 1e6:,.0f} MB"
        ratio = spread(row.times_as_fast) if row.times_as_fast else ""
        name = f"**{row.who}**" if row.who == OURS else row.who
        yield (
            f"| {row.what} | {name} | {spread(row.values)} {row.unit} | {ratio} | {memory} | "
            f"{row.note} |"
        )
    left_out: dict[tuple[str, float | None], list[str]] = {}
    for row in rows:
        if row.is_disturbed:
            left_out.setdefault((row.what, row.others), []).append(row.who)
    for (what, others), names in left_out.items():
        used = f"others used {percent(others)} of the processors"
        yield f"\nleft out: {what} ({', '.join(names)}), {used}"
