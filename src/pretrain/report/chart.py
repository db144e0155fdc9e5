"""Draws curves and bars: in come points, out goes inline SVG that needs no script.

Every SVG is laid out in percent, so that it fills any width while its letters and dots keep their
size; only the curves live in a stretched viewBox. Colours come from the page's CSS by class name.
Values that are not finite must have been left out before.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pretrain.report.run import Point
from pretrain.report.units import axis_number, count, text

MOST_POINTS = 600  # of a drawn curve; more than one per pixel of a usual page shows nothing new
MOST_DOTS = 60
N_STRIPS = 64  # columns that show the values beneath the pointer
BOX = 1000.0  # width and height of the stretched viewBox


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: `noisy` is drawn raw and smoothed, `line` as it is, `dots` with points marked."""

    name: str
    points: Sequence[Point]
    kind: Literal["noisy", "line", "dots"] = "line"


@dataclass(frozen=True, slots=True)
class Level:
    """A labelled horizontal line to compare with."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a bar chart."""

    name: str
    value: float
    is_model: bool = False


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Neighbouring points drawn as one."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class _Frame:
    """The values at the borders of the plot."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return (value - self.left) / (self.right - self.left) * BOX

    def y(self, value: float) -> float:
        # Far outside is as good as just outside, and keeps the file free of huge coordinates.
        return min(max((self.high - value) / (self.high - self.low) * BOX, -BOX), 2 * BOX)


def downsample(points: Sequence[Point], limit: int = MOST_POINTS) -> list[_Bucket]:
    """At most `limit` buckets of equally many neighbours, each with its mean, minimum, maximum."""
    width = max(1, math.ceil(len(points) / limit))
    buckets = []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        values = [y for _, y in part]
        mean = math.fsum(values) / len(values)
        buckets.append(_Bucket(part[len(part) // 2][0], mean, min(values), max(values)))
    return buckets


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    unit: str,
    levels: Sequence[Level] = (),
    from_zero: bool = False,
    is_small: bool = False,
) -> str:
    """A figure of curves over the step. Without any point it says so in words.

    `levels` that lie far from all curves are left out; the figure is for the curves.
    """
    series = [one for one in series if one.points]
    if not series:
        heading = f"<figcaption>{text(title)}</figcaption>"
        return f'<figure>{heading}<p class="none">No values yet.</p></figure>'
    frame = _frame(series, levels, from_zero=from_zero)
    shown = [level for level in levels if frame.low <= level.value <= frame.high]
    buckets = [
        downsample(one.points, 2 * N_STRIPS if one.kind == "dots" else MOST_POINTS)
        for one in series
    ]

    body = [_axes(frame, n_x=3 if is_small else 5, n_y=3 if is_small else 5)]
    body += [_level(level, frame) for level in shown]
    body += [_curves(one, parts, frame) for one, parts in zip(series, buckets, strict=True)]
    body.append(_level_labels(shown, frame, room=14.0 if is_small else 6.5))
    body.append(_strips(series, buckets, frame))
    told = [
        f"{one.name} {_short(one.points[0][1])} to {_short(one.points[-1][1])}" for one in series
    ]
    label = f"{title}, {unit}: {'; '.join(told)}; up to step {count(frame.right)}."
    legend = "" if len(series) == 1 else _legend(series)
    return (
        f'<figure class="{"small" if is_small else "large"}"><figcaption>{text(title)} '
        f'<span class="unit">{text(unit)}</span>{legend}</figcaption><div class="plot">'
        f'<svg role="img" aria-label="{text(label)}">{"".join(body)}</svg></div></figure>'
    )


def bar_chart(bars: Sequence[Bar], *, title: str, unit: str) -> str:
    """Horizontal bars from zero, in the order given, each with its name and value in letters."""
    top = max((bar.value for bar in bars), default=0.0) or 1.0
    row, rows = 34, []
    for i, bar in enumerate(bars):
        width = max(0.0, bar.value / top) * 84  # percent: the rest is for the value behind the bar
        rows.append(
            f'<svg class="{"bar model" if bar.is_model else "bar"}" y="{i * row}" height="{row}">'
            f'<rect x="0" y="6" height="22" rx="3" width="{width:.2f}%">'
            f"<title>{text(bar.name)}: {bar.value:.3f} {text(unit)}</title></rect>"
            f'<text x="0" dx="8" y="17" dy=".36em" class="in">{text(bar.name)}</text>'
            f'<text x="{width:.2f}%" dx="8" y="17" dy=".36em">{bar.value:.2f}</text></svg>'
        )
    label = f"{title}: " + ", ".join(f"{bar.name} {bar.value:.2f}" for bar in bars)
    return (
        f'<figure><figcaption>{text(title)} <span class="unit">{text(unit)}</span></figcaption>'
        f'<svg role="img" aria-label="{text(label)}" class="bars" height="{row * len(bars)}">'
        f"{''.join(rows)}</svg></figure>"
    )


def _frame(series: Sequence[Series], levels: Sequence[Level], *, from_zero: bool) -> _Frame:
    """Borders that show every curve, but let no single outlier flatten the rest."""
    lows, highs = [], []
    for one in series:
        values = sorted(y for _, y in one.points)
        tenth, ninetieth = values[len(values) // 10], values[(len(values) - 1) * 9 // 10]
        reach = 3 * (ninetieth - tenth) or math.inf
        lows.append(min(value for value in values if value >= tenth - reach))
        highs.append(max(value for value in values if value <= ninetieth + reach))
    low, high = min(lows), max(highs)
    span = high - low
    near = [level.value for level in levels if low - span <= level.value <= high + span]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    left = min(one.points[0][0] for one in series)
    right = max(one.points[-1][0] for one in series)
    return _Frame(
        left=left if right > left else left - 1,
        right=right,
        low=min(0.0, low) if from_zero else low - pad,
        high=high + pad,
    )


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round numbers within the borders."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.75)
    first = math.ceil(low / gap - 1e-9)
    return [float(f"{i * gap:.10g}") for i in range(first, math.floor(high / gap + 1e-9) + 1)]


def _short(value: float) -> str:
    """Four significant digits."""
    return axis_number(float(f"{value:.4g}"))


def _axes(frame: _Frame, *, n_x: int, n_y: int) -> str:
    parts = []
    for value in _ticks(frame.low, frame.high, n_y):
        y = frame.y(value) / 10
        parts.append(
            f'<line class="grid" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>'
            f'<text class="tick" x="0" dx="-8" y="{y:.2f}%" dy=".34em" text-anchor="end">'
            f"{axis_number(value)}</text>"
        )
    for i, value in enumerate(_ticks(frame.left, frame.right, n_x)[::-1]):
        x = frame.x(value) / 10
        parts.append(  # the odd ones are left out where it is narrow
            f'<text class="{"tick odd" if i % 2 else "tick"}" x="{x:.2f}%" y="100%" dy="1.5em" '
            f'text-anchor="{"end" if x > 98 else "middle"}">{axis_number(value)}</text>'
        )
    return "".join(parts)


def _curves(one: Series, buckets: Sequence[_Bucket], frame: _Frame) -> str:
    means = [bucket.mean for bucket in buckets]
    lines = ""
    if one.kind == "noisy":
        raw = [(b.x, y) for b in buckets for y in dict.fromkeys((b.low, b.high))]
        lines += _polyline(raw, frame, "raw")
        means = _smooth(means)
    lines += _polyline([(b.x, y) for b, y in zip(buckets, means, strict=True)], frame, one.kind)
    curves = f'<svg viewBox="0 0 {BOX:g} {BOX:g}" preserveAspectRatio="none">{lines}</svg>'
    if len(buckets) > 1 and (one.kind != "dots" or len(buckets) > MOST_DOTS):
        return curves
    dots = [(frame.x(b.x) / 10, frame.y(b.mean) / 10) for b in buckets]  # a lone point is no line
    return curves + "".join(
        f'<circle class="{one.kind}" cx="{x:.2f}%" cy="{y:.2f}%" r="3.5"/>'
        for x, y in dots
        if 0 <= y <= 100
    )


def _polyline(points: Sequence[Point], frame: _Frame, css: str) -> str:
    pairs = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    return f'<polyline class="{css}" points="{pairs}"/>'


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of the middle half of a centred window of 4%: no lag, and deaf to single spikes."""
    reach, n = len(values) // 50, len(values)
    smoothed = []
    for i in range(n):
        half = min(reach, i, n - 1 - i)  # narrower towards both ends
        window = sorted(values[i - half : i + half + 1])
        middle = window[len(window) // 4 : len(window) - len(window) // 4]
        smoothed.append(math.fsum(middle) / len(middle))
    return smoothed


def _level(level: Level, frame: _Frame) -> str:
    y = frame.y(level.value) / 10
    return f'<line class="level" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>'


def _level_labels(levels: Sequence[Level], frame: _Frame, *, room: float) -> str:
    """At the left, where a falling curve is far above; `room` apart, where two would overlap."""
    placed: list[tuple[float, Level]] = []
    for level in sorted(levels, key=lambda one: -one.value):
        y = frame.y(level.value) / 10
        placed.append((max(y, placed[-1][0] + room) if placed else y, level))
    return "".join(
        f'<text class="level" x="0" dx=".4em" y="{y:.2f}%" dy="-.4em">'
        f"{text(level.name)} {_short(level.value)}</text>"
        for y, level in placed
    )


def _strips(series: Sequence[Series], buckets: Sequence[Sequence[_Bucket]], frame: _Frame) -> str:
    """Invisible columns whose `<title>` tells the values beneath the pointer, without a script."""
    n = min(N_STRIPS, max(len(parts) for parts in buckets))
    edges = [frame.left + (frame.right - frame.left) * i / n for i in range(n + 1)]
    columns = [[bucket.x for bucket in parts] for parts in buckets]
    strips = []
    for i, (start, stop) in enumerate(pairwise(edges)):
        middle = (start + stop) / 2
        told = [f"step {count(middle)}"]
        for one, parts, xs in zip(series, buckets, columns, strict=True):
            nearest = min(bisect_left(xs, middle), len(xs) - 1)
            if nearest and middle - xs[nearest - 1] < xs[nearest] - middle:
                nearest -= 1
            told.append(f"{one.name} {_short(parts[nearest].mean)}")
        strips.append(
            f'<rect class="strip" x="{100 * i / n:.2f}%" width="{100 / n:.2f}%" height="100%">'
            f"<title>{text(' · '.join(told))}</title></rect>"
        )
    return "".join(strips)


def _legend(series: Sequence[Series]) -> str:
    keys = "".join(f'<span class="key {one.kind}">{text(one.name)}</span>' for one in series)
    return f'<span class="legend">{keys}</span>'
