"""Line charts as inline SVG, without scripts: the numbers that the macro `chart` draws.

Positions are in percent, so that a chart fills any width while its letters and dots keep their
size; only the curves are in a stretched viewBox. The page's CSS has the colours. All values must be
finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pretrain.report.run import Point
from pretrain.report.units import axis_number

MAX_POINTS = 600  # of a raw curve: more than one per pixel of a usual page is not visible
MAX_MEDIANS = 80  # of a smoothed curve, and dots of a dotted one
N_TICKS = 4  # of an axis, approximately

Levels = Sequence[tuple[str, float]]
"""Named horizontal lines to compare with."""
Bucket = tuple[float, float, float, float]
"""Neighbouring points drawn as one: x, and the lowest, the median and the highest y."""


class Series(NamedTuple):
    """One curve: `noisy` is drawn raw and smoothed, `dots` with its points, `mark` is one point."""

    name: str
    points: Sequence[Point]
    kind: Literal["noisy", "dots", "mark"] = "noisy"
    errors: Sequence[float] = ()
    """of each point, drawn as a band of one to either side"""

    def band(self) -> list[list[Point]]:
        """The lower and the upper border of the band; empty without errors."""
        pairs = list(zip(self.points, self.errors, strict=False))
        return [[(x, y + sign * e) for (x, y), e in pairs] for sign in (-1, 1) if pairs]


class _Axes(NamedTuple):
    """The values at the borders of the plot."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        """The position of a value in percent."""
        return (value - self.left) / (self.right - self.left) * 100

    def y(self, value: float) -> float:
        # Clamped, so that values far outside do not write huge coordinates.
        return min(max((self.high - value) / (self.high - self.low) * 100, -100), 200)

    def line(self, points: Sequence[Point]) -> str:
        """The points of a line in the viewBox."""
        return " ".join(f"{self.x(x):.2f},{self.y(y):.2f}" for x, y in points)


def downsample(points: Sequence[Point], limit: int) -> list[Bucket]:
    """At most `limit` buckets of equally many neighbours; medians ignore single spikes."""
    width, buckets = max(1, math.ceil(len(points) / limit)), list[Bucket]()
    for start in range(0, len(points), width):
        part = points[start : start + width]
        ys = sorted(y for _, y in part)
        buckets.append((part[len(part) // 2][0], ys[0], ys[len(ys) // 2], ys[-1]))
    return buckets


def line_chart(
    series: Sequence[Series], title: str, unit: str, levels: Levels = (), is_small: bool = False
) -> dict[str, Any]:
    """The values of the macro `chart`: curves over the step; a small chart starts at zero. Levels
    far from all curves are left out, since they would flatten them."""
    series = [one for one in series if one.points]
    chart: dict[str, Any] = {"title": title, "unit": unit, "is_small": is_small, "curves": []}
    if not series:
        return chart
    axes = _axes_of(series, levels, with_zero=is_small)
    ranges = [
        f"{one.name} {axis_number(one.points[0][1], 4)} to {axis_number(one.points[-1][1], 4)}"
        for one in series
    ]
    shown_levels, lowest = [], -math.inf
    # Names are at the left, where a falling curve is far above, and do not overlap.
    for name, value in sorted(levels, key=lambda level: -level[1]):
        if axes.low <= value <= axes.high:
            lowest = max(axes.y(value), lowest + 6.5)
            shown_levels.append((f"{name} {axis_number(value, 4)}", axes.y(value), lowest))
    return chart | {
        "label": f"{title}, {unit}: {'; '.join(ranges)}",
        "curves": [_curve(one, axes) for one in series],
        "levels": shown_levels,
        "x_ticks": [(axes.x(value), axis_number(value)) for value in _ticks(axes.left, axes.right)],
        "y_ticks": [(axes.y(value), axis_number(value)) for value in _ticks(axes.low, axes.high)],
    }


def _curve(one: Series, axes: _Axes) -> dict[str, Any]:
    """One curve: its lines and band in the viewBox, and its dots."""
    medians = [(x, median) for x, _, median, _ in downsample(one.points, MAX_MEDIANS)]
    lines: list[tuple[str, str]] = [(one.kind, axes.line(medians))]
    if one.kind == "noisy":
        raw = downsample(one.points, MAX_POINTS)
        lines.insert(
            0, ("raw", axes.line([(x, y) for x, low, _, high in raw for y in (low, high)]))
        )
    borders = [downsample(border, MAX_MEDIANS) for border in one.band()]
    outline = [(x, y) for x, _, y, _ in borders[0] + borders[1][::-1]] if borders else []
    # A single point is not a line. A dot has its values as a tooltip, without a script.
    has_dots = one.kind == "dots" or len(one.points) == 1
    dots = [
        (axes.x(x), axes.y(y), x, axis_number(y, 4))
        for x, y in medians
        if has_dots and axes.low <= y <= axes.high
    ]
    return {
        "name": one.name,
        "kind": one.kind,
        "lines": lines,
        "band": axes.line(outline),
        "dots": dots,
    }


def _axes_of(series: Sequence[Series], levels: Levels, *, with_zero: bool) -> _Axes:
    """Borders that show every curve, while a single outlier does not flatten the rest."""
    shown: list[float] = []
    for one in series:
        values = sorted(y for _, y in one.points)
        tenth, ninetieth = values[len(values) // 10], values[(len(values) - 1) * 9 // 10]
        reach = 3 * (ninetieth - tenth) or math.inf
        shown += [y for y in values if tenth - reach <= y <= ninetieth + reach]
        shown += [y for border in one.band() for _, y in border]
    low, high = min(shown), max(shown)
    shown += [y for _, y in levels if 2 * low - high <= y <= 2 * high - low]
    low, high = min(shown), max(shown)
    padding = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    steps = [x for one in series for x in (one.points[0][0], one.points[-1][0])]
    left, right = min(steps), max(steps)
    low = min(0.0, low) if with_zero else low - padding
    return _Axes(left if left < right else left - 1, right, low, high + padding)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the borders."""
    rough = (high - low) / N_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.75)
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    return [float(f"{i * gap:.10g}") for i in range(first, last + 1)]
