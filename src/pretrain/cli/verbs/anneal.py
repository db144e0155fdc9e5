"""Make more steps with a finished run, in place, while its rate falls in a straight line to 0.

The line begins at the rate of the last step. The old and the new curve are printed first.

pretrain anneal runs/english-1 --train.steps 2000      the new total
pretrain anneal runs/english-1 --train.steps 2000 --schedule.final_fraction 0.1

What is annealed is a run that ended above 0, such as one of schedule.name constant.
"""

from __future__ import annotations

import argparse
from typing import Any

from pretrain.cli.output import Output
from pretrain.cli.verbs.extend import add_run_arguments, go_on
from pretrain.optim.schedule import LRSchedule, anneal

TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, verb="anneal", settings="schedule.final_fraction")


def run(arguments: argparse.Namespace, output: Output) -> int:
    takes = ("schedule.final_fraction",)
    return go_on(arguments, output, verb="anneal", bend=_bend, takes=takes)


def _bend(curve: LRSchedule, *, done: int, steps: int, given: dict[str, Any]) -> LRSchedule:
    return anneal(curve, done=done, steps=steps, **given)
