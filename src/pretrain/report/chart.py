"""Draws curves: in come points, out goes inline SVG that needs no script.

Every SVG is laid out in percent, so that it fills any width while its letters and dots keep their
size; only the curves live in a stretched viewBox. Colours come from the page's CSS by class name.
Values that are not finite must have been left out before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pretrain.report.run import Point
from pretrain.report.units import axis_number, count, text

MOST_POINTS = 600  # of a raw curve; more than one per pixel of a usual page shows nothing new
MOST_MEDIANS = 80  # of a smooth curve, and dots of a dotted one
N_TICKS = 4  # of an axis, about

Levels = Sequence[tuple[str, float]]  # named horizontal lines to compare with


class Series(NamedTuple):
    """One curve: `noisy` is drawn raw and smoothed, `dots` with its points marked."""

    name: str
    points: Sequence[Point]
    kind: Literal["noisy", "dots"] = "noisy"
    errors: Sequence[float] = ()
    """of each point, drawn as a band of one to either side"""

    def borders(self) -> list[list[Point]]:
        """The lower and the upper end of the band; nothing without errors."""
        pairs = list(zip(self.points, self.errors, strict=False))
        return [[(x, y + sign * e) for (x, y), e in pairs] for sign in (-1, 1) if pairs]


class Bucket(NamedTuple):
    """Neighbouring points drawn as one."""

    x: float
    low: float
    median: float
    high: float


class _Frame(NamedTuple):
    """The values at the borders of the plot; `x` and `y` tell where a value lies, in percent."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return (value - self.left) / (self.right - self.left) * 100

    def y(self, value: float) -> float:
        # Far outside is as good as just outside, and keeps the file free of huge coordinates.
        return min(max((self.high - value) / (self.high - self.low) * 100, -100), 200)


def downsample(points: Sequence[Point], limit: int) -> list[Bucket]:
    """At most `limit` buckets of equally many neighbours; medians are deaf to single spikes."""
    width, buckets = max(1, math.ceil(len(points) / limit)), []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        ys = sorted(y for _, y in part)
        buckets.append(Bucket(part[len(part) // 2][0], ys[0], ys[len(ys) // 2], ys[-1]))
    return buckets


def line_chart(
    series: Sequence[Series], title: str, unit: str, levels: Levels = (), is_small: bool = False
) -> str:
    """A figure of curves over the step; a small one begins at zero. Without points it says so.

    `levels` that lie far from all curves are left out; the figure is for the curves.
    """
    series = [one for one in series if one.points]
    body = '<p class="none">No values yet.</p>'
    if series:
        frame = _frame(series, levels, with_zero=is_small)
        drawn = _axes(frame) + "".join(_curve(one, frame) for one in series)
        drawn += _levels(levels, frame)
        keys = "".join(f'<span class="key {one.kind}">{text(one.name)}</span>' for one in series)
        label = f"{title}, {unit}: " + "; ".join(
            f"{name} {axis_number(points[0][1], 4)} to {axis_number(points[-1][1], 4)}"
            for name, points, *_ in series
        )
        body = (
            f'<div class="legend">{keys}</div><div class="plot">'
            f'<svg role="img" aria-label="{text(label)}">{drawn}</svg></div>'
        )
    caption = f'<figcaption>{text(title)} <span class="unit">{text(unit)}</span></figcaption>'
    return f'<figure class="{"small" if is_small else "large"}">{caption}{body}</figure>'


def _frame(series: Sequence[Series], levels: Levels, *, with_zero: bool) -> _Frame:
    """Borders that show every curve, but let no single outlier flatten the rest."""
    shown: list[float] = []
    for one in series:
        values = sorted(y for _, y in one.points)
        tenth, ninetieth = values[len(values) // 10], values[(len(values) - 1) * 9 // 10]
        reach = 3 * (ninetieth - tenth) or math.inf
        shown += [y for y in values if tenth - reach <= y <= ninetieth + reach]
        shown += [y for border in one.borders() for _, y in border]
    low, high = min(shown), max(shown)
    shown += [y for _, y in levels if 2 * low - high <= y <= 2 * high - low]
    low, high = min(shown), max(shown)
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    steps = [x for one in series for x in (one.points[0][0], one.points[-1][0])]
    left, right = min(steps), max(steps)
    low = min(0.0, low) if with_zero else low - pad
    return _Frame(left if left < right else left - 1, right, low, high + pad)


def _axes(frame: _Frame) -> str:
    """The numbers beside and beneath the plot, and the horizontal lines of the grid."""
    drawn = ""
    for value in _ticks(frame.low, frame.high):
        y = f"{frame.y(value):.2f}%"
        drawn += (
            f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/><text class="tick" x="0" '
            f'dx="-8" y="{y}" dy=".34em" text-anchor="end">{axis_number(value)}</text>'
        )
    for value in _ticks(frame.left, frame.right):
        drawn += (
            f'<text class="tick" x="{frame.x(value):.2f}%" y="100%" dy="1.5em" '
            f'text-anchor="middle">{axis_number(value)}</text>'
        )
    return drawn


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within the borders."""
    rough = (high - low) / N_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.75)
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    return [float(f"{i * gap:.10g}") for i in range(first, last + 1)]


def _curve(one: Series, frame: _Frame) -> str:
    lines: dict[str, list[Point]] = {}
    if one.kind == "noisy":
        raw = downsample(one.points, MOST_POINTS)
        lines["raw"] = [(x, y) for x, low, _, high in raw for y in (low, high)]
    lines[one.kind] = [(x, median) for x, _, median, _ in downsample(one.points, MOST_MEDIANS)]
    drawn = ""
    for css, points in lines.items():
        pairs = " ".join(f"{frame.x(x):.2f},{frame.y(y):.2f}" for x, y in points)
        drawn += f'<polyline class="{css}" points="{pairs}"/>'
    drawn = _band(one, frame) + drawn
    drawn = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{drawn}</svg>'
    for x, y in lines[one.kind]:
        # A lone point is no line. The pointer upon a dot is told its values, without a script.
        if (one.kind == "dots" or len(one.points) == 1) and frame.low <= y <= frame.high:
            drawn += (
                f'<circle class="{one.kind}" cx="{frame.x(x):.2f}%" cy="{frame.y(y):.2f}%" r="3.5">'
                f"<title>step {count(x)}: {axis_number(y, 4)}</title></circle>"
            )
    return drawn


def _band(one: Series, frame: _Frame) -> str:
    borders = [downsample(border, MOST_MEDIANS) for border in one.borders()]
    if not borders:
        return ""
    around = [*borders[0], *reversed(borders[1])]
    pairs = " ".join(f"{frame.x(x):.2f},{frame.y(y):.2f}" for x, _, y, _ in around)
    return f'<polygon class="band" points="{pairs}"/>'


def _levels(levels: Levels, frame: _Frame) -> str:
    """Dashed lines, named at the left, where a falling curve is far above; without overlap."""
    drawn, lowest = "", -math.inf
    for name, value in sorted(levels, key=lambda level: -level[1]):
        if frame.low <= value <= frame.high:
            y = frame.y(value)
            lowest = max(y, lowest + 6.5)
            drawn += (
                f'<line class="level" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>'
                f'<text class="level" x="0" dx=".4em" y="{lowest:.2f}%" dy="-.4em">'
                f"{text(name)} {axis_number(value, 4)}</text>"
            )
    return drawn
