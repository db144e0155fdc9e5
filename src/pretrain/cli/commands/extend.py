"""Train a finished run for more steps, in place.

The learning rate rises from where it ended to its peak, then follows the run's own schedule over
the added steps. The old and the new schedule are printed first.

pretrain extend runs/english-1 --train.steps 2000      the new total
pretrain extend runs/english-1 --train.steps 2000 --optimizer.learning_rate 1e-3
"""

from __future__ import annotations

import argparse

from pretrain.cli.commands.train import run_request
from pretrain.cli.options import add_accept
from pretrain.cli.output import Output

TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings = "schedule.name, warmup_steps, decay_fraction, final_fraction; learning_rate"
    add_run_arguments(parser, command="extend", settings=settings)


def run(args: argparse.Namespace, output: Output) -> int:
    return run_request("extend", args, output)


def add_run_arguments(parser: argparse.ArgumentParser, *, command: str, settings: str) -> None:
    """Add the arguments of extend and of anneal."""
    parser.usage = f"pretrain {command} RUN --train.steps N [--SECTION.KEY VALUE ...] [options]"
    parser.add_argument("run", metavar="RUN", help="a finished run; new steps are added to it")
    parser.set_defaults(target=None)
    add_accept(parser)
    parser.epilog = (
        f"settings: --train.steps N, the new total; {settings}; train.evaluate_every, save_every, "
        "keep_checkpoints and patience. They apply to the added steps; the others do not change."
    )
