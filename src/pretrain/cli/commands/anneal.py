"""Train a finished run for more steps, in place, while its learning rate falls linearly to 0.

The line starts at the learning rate of the last step. The old and the new schedule are printed
first.

pretrain anneal runs/english-1 --train.steps 2000      the new total
pretrain anneal runs/english-1 --train.steps 2000 --schedule.final_fraction 0.1

Only a run that ended above 0 can be annealed, such as one with schedule.name constant.
"""

from __future__ import annotations

from functools import partial

from pretrain.cli.commands import extend, train

USAGE = extend.USAGE.replace("extend", "anneal")
OPTIONS = extend.OPTIONS
epilog = partial(extend.epilog, "anneal")
run = partial(train.run, kind="anneal")
