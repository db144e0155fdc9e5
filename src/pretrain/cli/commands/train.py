"""Train a model: on the bundled corpus, a recipe, a config file, or any text.

pretrain train                        the recipe `english`: a GPT learns English in a few minutes
pretrain train my.txt                 the same settings on your own file or folder
pretrain train --resume               continue the run that was started last
pretrain train --resume --accept threads      ... although this has changed
pretrain train --train.steps 200 --model.d_model 64
pretrain train --profile              where a step's time goes; nothing is trained
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pretrain.cli.options import add_accept, settings_help
from pretrain.cli.output import Output
from pretrain.config import Layer, parse_overrides

TAKES_SETTINGS = True
epilog = settings_help


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "pretrain train [RECIPE | FILE.yaml | TEXT FILE or FOLDER] [--SECTION.KEY VALUE ...] "
        "[options]"
    )
    parser.add_argument("target", nargs="?", metavar="TARGET", help="recipe, .yaml file, or text")
    parser.add_argument("--run", metavar="DIR", help="run directory; default runs/<recipe>-<n>")
    parser.add_argument("--resume", action="store_true", help="continue --run, or the newest run")
    parser.add_argument("--profile", action="store_true", help="show where a step's time goes")
    add_accept(parser)


def run(args: argparse.Namespace, output: Output) -> int:
    if args.profile:
        if args.resume or args.run:
            raise ValueError("--profile must come without --resume and --run: it starts no run")
        return _profile(args.target, parse_overrides(args.settings), output)
    return run_request("resume" if args.resume else "new", args, output)


def run_request(
    kind: Literal["new", "resume", "extend", "anneal"], args: argparse.Namespace, output: Output
) -> int:
    """Start, resume, extend or anneal a run, and return the exit code."""
    start_time = time.perf_counter()
    overrides = parse_overrides(args.settings)
    from pretrain.runner.start import Request, start

    request = Request(
        kind=kind,
        target=args.target,
        overrides=overrides,
        folder=Path(args.run) if args.run else None,
        accepted=tuple(args.accept),
        json=args.json,
        start_time=start_time,
    )
    result = start(request, output.stream)
    if result.is_main:
        output.result(result.to_json())
    return result.exit_code


def _profile(target: str | None, overrides: Layer, output: Output) -> int:
    """Measure the parts of a training step."""
    from pretrain.runner.launch import open_world_of
    from pretrain.runner.request import compose_target, errors_of_machine, read_target
    from pretrain.runner.text import open_text

    _, layers = read_target(target)
    config = compose_target(target, layers, overrides, rules=errors_of_machine)
    data = open_text(config, output.log)
    # Torch's profiler prints to standard error when it starts and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from pretrain.train.profile import lines, profile_steps

    profile = profile_steps(config, data, open_world_of(config))
    for line in lines(profile):
        output.log(line)
    output.result(asdict(profile))
    return 0
