"""Values as people read them: in come numbers, out go short texts with their units; and safe HTML.

`None` stands for an unknown number and becomes a dash. Nothing is refused.
"""

from __future__ import annotations

import re
from html import escape
from itertools import dropwhile

UNKNOWN = "–"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def text(value: object) -> str:
    """Any value as safe HTML text: escaped, and without characters that no page may contain."""
    return escape(_UNPRINTABLE.sub("\ufffd", str(value).replace("\r\n", "\n")))


def count(value: float | None) -> str:
    """A whole number with thousands separators: `1,034`."""
    return UNKNOWN if value is None else f"{round(value):,}"


def decimal(value: float | None, digits: int = 2) -> str:
    """A fixed count of digits after the point: `1.39`; very large numbers as `1.2e+09`."""
    if value is None:
        return UNKNOWN
    return f"{value:.3g}" if abs(value) >= 1e7 else f"{value:,.{digits}f}"


def short_count(value: float | None) -> str:
    """All digits below a million, three from there: `11,640`, `4.21 M`, `1.56 B`."""
    return _three_digits(value, {"T": 1e12, "B": 1e9, "M": 1e6}) or count(value)


def size(n_bytes: float | None) -> str:
    """Bytes in powers of 1,000: `812 MB`, `1.25 GB`."""
    small = UNKNOWN if n_bytes is None else f"{round(n_bytes)} B"
    return _three_digits(n_bytes, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}) or small


def _three_digits(value: float | None, units: dict[str, float]) -> str:
    """`value` in the largest unit that it reaches; nothing where it reaches none."""
    for name, unit in units.items():
        if value is not None and value >= unit * 0.9995:  # which would round to 1,000 of the next
            return f"{value / unit:#.3g}".rstrip(".") + f" {name}"
    return ""


def duration(seconds: float | None) -> str:
    """The largest unit and the next: `0.4 s`, `42 s`, `3 min 2 s`, `1 h 5 min`, `2 d 3 h`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    parts = {"d": whole // 86400, "h": whole // 3600 % 24, "min": whole // 60 % 60, "s": whole % 60}
    shown = list(dropwhile(lambda unit: parts[unit] == 0, parts))[:2]
    return " ".join(f"{parts[unit]} {unit}" for unit in shown if parts[unit])


def axis_number(value: float, digits: int = 6) -> str:
    """As short as it can be beside an axis: `0`, `2e-5`, `0.003`, `1,000`, `12k`, `1.5M`."""
    if abs(value) >= 1e4:
        unit, name = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k")
        return f"{value / unit:,.{digits}g}{name}"
    return f"{value:,.{digits}g}" if abs(value) >= 1e-3 else f"{value:.2g}".replace("e-0", "e-")
