"""A run directory -> one page that a person can read, and other people's experiment trackers.

    run directory --read_run--> Run --story, chart--> page --write_report--> report.html
    metrics.jsonl --follow (a process of its own)--> TensorBoard | W&B offline

`run` reads the files and forgives what is missing; `story` turns numbers into sentences, `units`
into short texts, `chart` into SVG, `heat_map` into coloured text; `page` puts them together;
`trackers` never runs inside the training loop. No torch here, and no other room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.report.config import ReportConfig, require_packages
    from pretrain.report.heat_map import heat_map_page
    from pretrain.report.page import write_report
    from pretrain.report.run import Run, read_run
    from pretrain.report.trackers import follow

__getattr__ = lazily(
    __name__,
    config="ReportConfig require_packages",
    heat_map="heat_map_page",
    page="write_report",
    run="Run read_run",
    trackers="follow",
)
__all__ = [
    "ReportConfig",
    "Run",
    "follow",
    "heat_map_page",
    "read_run",
    "require_packages",
    "write_report",
]
