"""A run directory -> one page that a person can read, and other people's experiment trackers.

    run directory --read_run--> Run --story, chart--> page --write_report--> report.html
    metrics.jsonl --trackers.follow (a process of its own)--> TensorBoard | W&B offline

`run` reads the files and forgives what is missing; `story` turns numbers into sentences, `units`
into short texts, `chart` into SVG; `page` puts them together; `trackers` never runs inside the
training loop, and so is imported by its own name. No torch here, and no other room.
"""

from pretrain.report.config import ReportConfig, require_packages
from pretrain.report.page import write_report
from pretrain.report.run import Run, read_run

__all__ = ["ReportConfig", "Run", "read_run", "require_packages", "write_report"]
