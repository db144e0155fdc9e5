"""The `report` section of a config: in come names of experiment trackers, out goes a checked tuple.

Unknown names are refused here; so are, when `require_packages` is asked, missing packages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, slots=True)
class ReportConfig:
    """Where a run's numbers go besides its own files."""

    to: tuple[str, ...] = ()
    """Trackers that follow metrics.jsonl from a process of their own: tensorboard, wandb."""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        for name in self.to:
            if name not in TRACKERS:
                yield (
                    "to",
                    f"report.to contains {name!r}, which is not a tracker; legal are "
                    f"{', '.join(TRACKERS)} (or nothing: the run's own report is always written)",
                )


def require_packages(to: Iterable[str]) -> None:
    """Raises ValueError, with the command that helps, where a tracker's package is missing."""
    for name in ReportConfig(to=tuple(to)).to:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of that name is no package
            raise ValueError(
                f"report.to contains {name!r}, but its package is not installed; "
                f"install it with: pip install 'pretrain[{name}]'"
            )
