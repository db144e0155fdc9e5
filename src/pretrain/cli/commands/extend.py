"""Train a finished run for more steps, in place. The old and the new schedule are printed first.

pretrain extend runs/english-1 --train.steps 2000      the new total
pretrain extend runs/english-1 --train.steps 2000 --optimizer.learning_rate 1e-3
pretrain anneal runs/english-1 --train.steps 2000
pretrain anneal runs/english-1 --train.steps 2000 --schedule.final_fraction 0.1

With `extend` the learning rate rises from where it ended to its peak, then follows the run's own
schedule over the added steps. With `anneal` it falls in a line from where it ended to 0; only a run
that ended above 0 can be annealed, such as one with schedule.name constant.
"""

from __future__ import annotations

import argparse

from pretrain.cli.commands import train
from pretrain.cli.options import ACCEPT, option
from pretrain.cli.output import Output

USAGE = "%(prog)s RUN --train.steps N [--SECTION.KEY VALUE ...] [options]"
OPTIONS = (option("RUN", "a finished run; new steps are added to it"), ACCEPT)


def epilog() -> str:
    """Return the settings that the commands accept."""
    from pretrain.runner.checks import EXTENSION_SETTINGS

    rows = [f"  {name}: {', '.join(keys)}" for name, keys in EXTENSION_SETTINGS.items()]
    return "\n".join(["settings for the added steps; the others do not change:", *rows])


def run(args: argparse.Namespace, output: Output) -> int:
    return train.run(args, output, kind=args.command)
