"""A measured figure, and a table of them: medians with their lowest and highest, and how many times
as fast ours is, a ratio of each round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

OURS = "pretrain"


@dataclass(frozen=True, kw_only=True)
class Row:
    what: str
    who: str
    unit: str
    values: tuple[float, ...]
    """one a round"""
    times_as_fast: tuple[float, ...] = ()
    """ours over it, one a round, sorted"""
    memory: float | None = None
    """most that its process held, in bytes"""
    note: str = ""


def rows_of(
    what: str,
    unit: str,
    values: dict[str, Sequence[float]],
    *,
    memory: dict[str, float] | None = None,
    notes: dict[str, str] | None = None,
) -> list[Row]:
    """A row for each contestant. Seconds are better the fewer, all other units the more."""
    our_values = values[OURS]
    rows = []
    for who, measured in values.items():
        pairs = zip(our_values, measured, strict=True)
        ratios = [b / a if unit == "s" else a / b for a, b in pairs]
        rows.append(
            Row(
                what=what,
                who=who,
                unit=unit,
                values=tuple(measured),
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
    """Lines of a table in Markdown."""
    yield "| what | who | median (lowest to highest) | pretrain, times as fast | memory | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        memory = "" if row.memory is None else f"{row.memory / 1e6:,.0f} MB"
        ratio = spread(row.times_as_fast) if row.times_as_fast else ""
        name = f"**{row.who}**" if row.who == OURS else row.who
        yield (
            f"| {row.what} | {name} | {spread(row.values)} {row.unit} | {ratio} | {memory} | "
            f"{row.note} |"
        )
