"""Self-tests on the user's machine: `verify` compares a resumed run with an uninterrupted one,
`doctor` checks one process, or that several can train together.

Each check returns a `Check`; a `Report` prints them and has the result for --json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.runner.text import Log

EXACT = "exact"
AGREES = "agrees"
DIFFERS = "differs"
NOT_JUDGED = "not judged"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check: one of the verdicts above, and the numbers behind it."""

    verdict: str
    found: str


def max_difference(one: list[float], other: list[float]) -> float:
    """Return the largest difference of two loss curves, relative to the first."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def judge(difference: float, tolerance: float, what: str) -> Check:
    """Judge such a difference of two runs, which `what` describes."""
    verdict = AGREES if difference <= tolerance else DIFFERS
    return Check(verdict, f"{what}: losses differ by {difference:.1e} (tolerance {tolerance:.0e})")


@dataclass(frozen=True, slots=True)
class Report:
    """Checks by name, each printed as soon as it is added."""

    log: Log
    checks: dict[str, Check] = field(default_factory=dict)

    def add(self, name: str, check: Check) -> None:
        self.checks[name] = check
        self.log(f"  {name:<12} {check.verdict:<10}  {check.found}")

    def failed(self) -> list[str]:
        """Return the names of checks that failed."""
        return [name for name, check in self.checks.items() if check.verdict == DIFFERS]

    def to_json(self) -> dict[str, Any]:
        """Return the checks as --json has them."""
        return {name: asdict(check) for name, check in self.checks.items()}
