"""Write a run's report.html: one page, no network, made from the files of the run directory.

pretrain report runs/english-1
"""

from __future__ import annotations

import argparse

from pretrain.cli.options import RUN
from pretrain.cli.output import Output
from pretrain.report.page import write_report

OPTIONS = (RUN,)


def run(args: argparse.Namespace, output: Output) -> None:
    path = write_report(args.run)
    output.log(str(path))
    output.result({"report": str(path)})
