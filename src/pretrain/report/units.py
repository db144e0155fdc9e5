"""Values as people read them: in come numbers, out go short texts with their units; and safe HTML.

`None` stands for an unknown number and becomes a dash. Nothing is refused.
"""

from __future__ import annotations

import re
from html import escape

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
    if value is None:
        return UNKNOWN
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= limit * 0.9995:  # which would round to 1,000 of the unit below
            return f"{_three_digits(value / limit)} {unit}"
    return count(value)


def size(n_bytes: float | None) -> str:
    """Bytes in powers of 1,000: `812 MB`, `1.25 GB`."""
    if n_bytes is None:
        return UNKNOWN
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(n_bytes) >= limit * 0.9995:
            return f"{_three_digits(n_bytes / limit)} {unit}"
    return f"{round(n_bytes)} B"


def duration(seconds: float | None) -> str:
    """The largest unit and the next: `0.4 s`, `42 s`, `3 min 2 s`, `1 h 5 min`, `2 d 3 h`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole >= 3600:  # seconds no longer matter: round them into the minutes
        whole = round(whole / 60) * 60
    parts = (
        (whole // 86400, "d"),
        (whole // 3600 % 24, "h"),
        (whole // 60 % 60, "min"),
        (whole % 60, "s"),
    )
    first = next(i for i, (value, _) in enumerate(parts) if value)
    return " ".join(f"{value} {unit}" for value, unit in parts[first : first + 2] if value)


def axis_number(value: float) -> str:
    """As short as it can be beside an axis: `0`, `2e-5`, `0.003`, `1,000`, `12k`, `1.5M`."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:,g}M" if abs(value) < 1e12 else f"{value:.1e}"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:,g}" if abs(value) >= 1e-3 else f"{value:.2g}".replace("e-0", "e-")


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}"
