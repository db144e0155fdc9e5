"""Train a model: on the bundled corpus, a recipe, a config file, or any text.

pretrain train                        the recipe `english`: a GPT learns English in a few minutes
pretrain train my.txt                 the same settings on your own file or folder
pretrain train --resume               go on with the run that was begun last
pretrain train --resume --accept threads      ... though this is not as it was
pretrain train --train.steps 200 --model.d_model 64
pretrain train --profile              where a step's time goes; nothing is trained
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path

from pretrain.cli.beginning import start
from pretrain.cli.going_on import resume
from pretrain.cli.machine import mistakes_here, with_whole_paths
from pretrain.cli.output import Output
from pretrain.cli.processes import agreed_folder, join, launch_train
from pretrain.cli.settings import settings_help
from pretrain.config import RunConfig, parse_overrides
from pretrain.distributed import n_restarts
from pretrain.runner.launch import must_launch, n_processes_of_run, open_world_of
from pretrain.runner.request import (
    compose_target,
    is_started,
    new_run_folder,
    newest_run,
    read_target,
)
from pretrain.runner.text import open_text

TAKES_SETTINGS = True
epilog = settings_help


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "pretrain train [RECIPE | FILE.yaml | TEXT FILE or FOLDER] [--SECTION.KEY VALUE ...] "
        "[options]"
    )
    parser.add_argument("target", nargs="?", metavar="TARGET", help="recipe, .yaml file, or text")
    parser.add_argument("--run", metavar="DIR", help="run directory; default runs/<recipe>-<n>")
    parser.add_argument(
        "--resume", action="store_true", help="go on with --run, or with the newest run"
    )
    parser.add_argument("--profile", action="store_true", help="show where a step's time goes")
    add_accept(parser)


def add_accept(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="CHANGE",
        help="go on although CHANGE is not as it was, and record it in changes.jsonl; a refusal "
        "names the changes; may be repeated",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    began = time.perf_counter()
    overrides = parse_overrides(arguments.settings)
    if arguments.profile and (arguments.resume or arguments.run):
        raise ValueError("--profile makes no run and needs none: leave out --resume and --run")
    if arguments.resume:
        folder = Path(arguments.run) if arguments.run else newest_run()
        target, accepted = arguments.target, tuple(arguments.accept)
        if (n := n_processes_of_run(folder, overrides)) > 1:
            return launch_train(arguments, folder, n, output)
        return resume(folder, target, overrides, output, began, accepted=accepted)
    if arguments.accept:
        raise ValueError("--accept goes with --resume: a new run has nothing that could change")
    name, layers = read_target(arguments.target)
    config = compose_target(arguments.target, layers, overrides, also=mistakes_here)
    if arguments.profile:
        return _profile(config, output)
    if must_launch(config):
        folder = new_run_folder(name, arguments.run)
        return launch_train(arguments, folder, config.parallel.processes, output)
    if n_restarts() and not arguments.run:
        raise ValueError("a restart finds its run by --run DIR; give it to torchrun's command too")
    if n_restarts() and is_started(Path(arguments.run)):
        return resume(Path(arguments.run), None, {}, output, began)
    world, output = join(config, output)
    folder = agreed_folder(world, lambda: new_run_folder(name, arguments.run))
    return start(with_whole_paths(config), folder, output, began, world)


def _profile(config: RunConfig, output: Output) -> int:
    data = open_text(config, output.say)
    # Torch's profiler says on standard error when it begins and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from pretrain.train.profile import lines, profile_steps

    found = profile_steps(config, data, open_world_of(config))
    for line in lines(found):
        output.say(line)
    output.result(asdict(found))
    return 0
