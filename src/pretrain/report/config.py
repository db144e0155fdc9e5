"""The section `report` of a config: experiment trackers that a run's metrics are sent to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

from pretrain import missing_package
from pretrain.validation import Checked

Tracker = Literal["tensorboard", "wandb"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)


@dataclass(frozen=True, slots=True)
class ReportConfig(Checked):
    """The section `report`."""

    section = "report"

    to: tuple[Tracker, ...] = ()
    """trackers that get a copy of metrics.jsonl, each in a separate process: tensorboard, wandb;
    the run's own report.html is always written"""


def require_packages(to: Iterable[str]) -> None:
    """Raise ValueError, with the command that installs it, if a tracker's package is missing."""
    for name in to:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is not a package
            raise missing_package(f"report.to {name}", name, extra=name)
