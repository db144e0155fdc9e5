"""Train a finished run for more steps, in place.

The learning rate rises from where it ended to its peak, then follows the run's own schedule over
the added steps. The old and the new schedule are printed first.

pretrain extend runs/english-1 --train.steps 2000      the new total
pretrain extend runs/english-1 --train.steps 2000 --optimizer.learning_rate 1e-3
"""

from __future__ import annotations

from functools import partial

from pretrain.cli.commands import train
from pretrain.cli.options import ACCEPT, option

USAGE = "pretrain extend RUN --train.steps N [--SECTION.KEY VALUE ...] [options]"
OPTIONS = (option("RUN", "a finished run; new steps are added to it"), ACCEPT)
run = partial(train.run, kind="extend")


def epilog(command: str = "extend") -> str:
    """Return the settings that the command accepts."""
    from pretrain.runner.checks import EXTENSION_SETTINGS

    first, *others = EXTENSION_SETTINGS[command]
    return (
        f"settings: --{first} N, the new total; {', '.join(others)}. They apply to the added "
        "steps; the others do not change."
    )
