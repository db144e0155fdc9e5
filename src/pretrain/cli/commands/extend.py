"""Train a finished run for more steps, in place.

The learning rate rises from where it ended to its peak, then follows the run's own schedule over
the added steps. The old and the new schedule are printed first.

pretrain extend runs/english-1 --train.steps 2000      the new total
pretrain extend runs/english-1 --train.steps 2000 --optimizer.learning_rate 1e-3
"""

from __future__ import annotations

import argparse

from pretrain.cli.commands.train import run_request
from pretrain.cli.options import ACCEPT, Option
from pretrain.cli.output import Output

USAGE = "pretrain extend RUN --train.steps N [--SECTION.KEY VALUE ...] [options]"
OPTIONS = (Option("RUN", "a finished run; new steps are added to it"), ACCEPT)


def epilog(
    settings: str = "schedule.name, warmup_steps, decay_fraction, final_fraction; learning_rate",
) -> str:
    """Return the settings that the command accepts."""
    return (
        f"settings: --train.steps N, the new total; {settings}; train.evaluate_every, save_every, "
        "keep_checkpoints and patience. They apply to the added steps; the others do not change."
    )


def run(args: argparse.Namespace, output: Output) -> int:
    return run_request("extend", args, output)
