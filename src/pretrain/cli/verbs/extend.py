"""Make more steps with a finished run, in place.

The rate rises from where it ended to its peak, then follows the run's own schedule over the added
steps. The old and the new curve are printed first.

pretrain extend runs/english-1 --train.steps 2000      the new total
pretrain extend runs/english-1 --train.steps 2000 --optimizer.learning_rate 1e-3
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.cli.continuing import Continuation, given_settings, was_begun
from pretrain.cli.going_on import resume
from pretrain.cli.output import Output
from pretrain.cli.processes import launch_continuation
from pretrain.cli.resuming import read_run
from pretrain.cli.verbs.train import add_accept
from pretrain.config import Layer, parse_overrides
from pretrain.optim.schedule import LRSchedule, extend
from pretrain.runner.launch import n_processes_of_run

TAKES_SETTINGS = True
_TAKES = (
    "schedule.name",
    "schedule.warmup_steps",
    "schedule.decay_fraction",
    "schedule.final_fraction",
    "optimizer.learning_rate",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings = "schedule.name, warmup_steps, decay_fraction, final_fraction; learning_rate"
    add_run_arguments(parser, verb="extend", settings=settings)


def run(arguments: argparse.Namespace, output: Output) -> int:
    return go_on(arguments, output, verb="extend", bend=extend, takes=_TAKES)


def add_run_arguments(parser: argparse.ArgumentParser, *, verb: str, settings: str) -> None:
    """The arguments of extend and of anneal."""
    parser.usage = f"pretrain {verb} RUN --train.steps N [--SECTION.KEY VALUE ...] [options]"
    parser.add_argument("run", metavar="RUN", help="a finished run; it goes on in place")
    add_accept(parser)
    parser.epilog = (
        f"settings: --train.steps N, the new total; {settings}; train.evaluate_every, save_every, "
        "keep_checkpoints and patience. They hold for the added steps; the rest stays."
    )


def go_on(
    arguments: argparse.Namespace,
    output: Output,
    *,
    verb: str,
    bend: Callable[..., LRSchedule],
    takes: tuple[str, ...],
) -> int:
    """Extend or anneal; `takes` are its settings besides those that both have."""
    began = time.perf_counter()
    folder = Path(arguments.run)
    if (folder / "manifest.json").is_file():
        raise ValueError(
            f"{folder} is a checkpoint; {verb} goes on with a whole run, from its last step. From "
            f"an earlier state begin another run: pretrain train --train.init_from {folder}"
        )
    overrides = parse_overrides(arguments.settings)
    stored, accepted = read_run(folder), tuple(arguments.accept)
    given = given_settings(overrides, takes)
    if given.get("train.steps") is None:
        raise ValueError(f"{verb} needs --train.steps N, the new total, above {stored.train.steps}")
    if (n := n_processes_of_run(folder, overrides)) > 1:
        steps = given["train.steps"]
        return launch_continuation(
            arguments, verb, n, output, is_under_way=lambda: read_run(folder).train.steps == steps
        )
    if was_begun(folder, stored, verb, given):
        return resume(folder, None, overrides, output, began, accepted=accepted)
    rest: Layer = {
        section: {k: v for k, v in keys.items() if f"{section}.{k}" not in given}
        for section, keys in overrides.items()
    }
    return resume(
        folder,
        None,
        rest,
        output,
        began,
        accepted=accepted,
        continuation=Continuation(verb, bend, given),
    )
