"""Write a run's report.html: one page, no network, made from the files of the run directory.

pretrain report runs/english-1
"""

from __future__ import annotations

import argparse

from pretrain.cli.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")


def run(arguments: argparse.Namespace, output: Output) -> int:
    from pretrain.report import write_report

    path = write_report(arguments.run)
    output.say(str(path))
    output.result({"report": str(path)})
    return 0
