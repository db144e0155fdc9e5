"""Numbers as human-readable text with units. What is not a finite number becomes a dash."""

from __future__ import annotations

import math
from itertools import dropwhile

UNKNOWN = "–"


def number(value: object) -> float | None:
    """`value` if it is a finite number, else None (`"NaN"`, null, true, text, infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond the range of a float
        return None


def count(value: object) -> str:
    """A whole number with thousands separators: `1,034`."""
    n = number(value)
    return UNKNOWN if n is None else f"{round(n):,}"


def decimal(value: object, digits: int = 2) -> str:
    """A fixed number of digits after the point: `1.39`; very large numbers as `1.2e+09`."""
    n = number(value)
    if n is None:
        return UNKNOWN
    return f"{n:.3g}" if abs(n) >= 1e7 else f"{n:,.{digits}f}"


def percent(share: object, digits: int = 1) -> str:
    """A share as `65.6%`."""
    return f"{number(share) or 0:.{digits}%}"


def short_count(value: object) -> str:
    """All digits below a million, three above: `11,640`, `4.21 M`, `1.56 B`."""
    return _three_digits(number(value), {"T": 1e12, "B": 1e9, "M": 1e6}) or count(value)


def size(n_bytes: object) -> str:
    """Bytes in powers of 1,000: `812 MB`, `1.25 GB`."""
    n = number(n_bytes)
    small = UNKNOWN if n is None else f"{round(n)} B"
    return _three_digits(n, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}) or small


def _three_digits(value: float | None, units: dict[str, float]) -> str:
    """The value in the largest unit that it reaches, or "" if it is smaller than all units."""
    for name, unit in units.items():
        if value is not None and value >= unit * 0.9995:  # which rounds to 1,000 of the next unit
            return f"{value / unit:#.3g}".rstrip(".") + f" {name}"
    return ""


def duration(seconds: object) -> str:
    """The largest unit and the next: `0.4 s`, `42 s`, `3 min 2 s`, `1 h 5 min`, `2 d 3 h`."""
    value = number(seconds)
    if value is None:
        return UNKNOWN
    if value < 9.95:
        return f"{value:.1f} s"
    s = round(value)
    parts = {"d": s // 86400, "h": s // 3600 % 24, "min": s // 60 % 60, "s": s % 60}
    shown = list(dropwhile(lambda unit: parts[unit] == 0, parts))[:2]
    return " ".join(f"{parts[unit]} {unit}" for unit in shown if parts[unit])


def axis_number(value: float, digits: int = 6) -> str:
    """Short text for an axis: `0`, `2e-5`, `0.003`, `1,000`, `12k`, `1.5M`."""
    if abs(value) >= 1e4:
        unit, name = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k")
        return f"{value / unit:,.{digits}g}{name}"
    return f"{value:,.{digits}g}" if abs(value) >= 1e-3 else f"{value:.2g}".replace("e-0", "e-")
