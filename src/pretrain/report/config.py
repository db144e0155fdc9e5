"""The `report` section of a config: in come names of experiment trackers, out goes a checked tuple.

Unknown names are refused here, before anything else is imported. Whether a tracker's package is
installed is asked later, by `pretrain.report.trackers.require_packages`.
"""

from __future__ import annotations

from dataclasses import dataclass

TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, slots=True)
class ReportConfig:
    """Where a run's numbers go besides its own files."""

    to: tuple[str, ...] = ()
    """Trackers that follow metrics.jsonl from a process of their own: tensorboard, wandb."""

    def __post_init__(self) -> None:
        for name in self.to:
            if name not in TRACKERS:
                raise ValueError(
                    f"report.to contains {name!r}, which is not a tracker; legal are "
                    f"{', '.join(TRACKERS)} (or nothing: the run's own report is always written)"
                )
