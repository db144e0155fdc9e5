"""Self-tests on the user's machine: `verify` compares a resumed run with an uninterrupted one,
`doctor` checks one process, `rendezvous` several.

Each check returns a `Check`; `check_line` formats it for the console, `to_json` for --json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

EXACT = "exact"
AGREES = "agrees"
DIFFERS = "differs"
NOT_JUDGED = "not judged"

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check: one of the verdicts above, and the numbers behind it."""

    verdict: str
    detail: str


def check_line(name: str, check: Check) -> str:
    """Return a line of the console's table."""
    return f"  {name:<12} {check.verdict:<10}  {check.detail}"


def to_json(checks: Mapping[str, Check]) -> dict[str, dict[str, str]]:
    """Return the checks as --json has them."""
    return {name: {"verdict": c.verdict, "found": c.detail} for name, c in checks.items()}


def failed(checks: Mapping[str, Check]) -> list[str]:
    """Return the names of checks that failed."""
    return [name for name, check in checks.items() if check.verdict == DIFFERS]
