"""The report of a run as one offline HTML page, and experiment trackers.

    run directory --read_run_files--> RunFiles --page, templates--> report.html
    metrics.jsonl --trackers (in their own process)--> TensorBoard | W&B offline

`run` reads the files and tolerates missing ones; `page` computes what the templates show, `chart`
draws SVG, `heat_map` colours text, `units` formats numbers. It does not need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.report.config import ReportConfig, require_packages
    from pretrain.report.heat_map import heat_map_page
    from pretrain.report.page import write_report
    from pretrain.report.run import RunFiles, read_run_files
    from pretrain.report.trackers import follow

__getattr__ = lazily(
    __name__,
    config="ReportConfig require_packages",
    heat_map="heat_map_page",
    page="write_report",
    run="RunFiles read_run_files",
    trackers="follow",
)
__all__ = [
    "ReportConfig",
    "RunFiles",
    "follow",
    "heat_map_page",
    "read_run_files",
    "require_packages",
    "write_report",
]
