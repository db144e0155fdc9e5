"""Train a model: on the bundled corpus, a recipe, a config file, or any text.

pretrain train                        the recipe `english`: a small model of the family fast learns
                                      English in a few minutes
pretrain train my.txt                 the same settings on your own file or folder
pretrain train a.txt b.txt books/     ... or on several, as one corpus
pretrain train my.txt --from bundled  ... standing on the bundled English corpus: for small texts
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

from pretrain.cli.options import ACCEPT, option, settings_help
from pretrain.cli.output import Output
from pretrain.run.directory import CHECKPOINT_MANIFEST, CONFIG

USAGE = "pretrain train [TEXT ... | RECIPE | FILE.yaml] [--SECTION.KEY VALUE ...] [options]"
OPTIONS = (
    option(
        "TARGET",
        "one or more texts; or a recipe (characters, english, multitask, transformer); or a .yaml "
        "file [english]",
        nargs="*",
    ),
    option("--run DIR", "run directory; default runs/<recipe>-<n>"),
    option(
        "--from MODEL|TEXT",
        "stand on a model (train.init_from), or on a larger text of the same language (data.base), "
        "such as bundled",
        dest="base",
    ),
    option("--resume", "continue --run, or the newest run"),
    option("--profile", "show where a step's time goes"),
    ACCEPT,
)
epilog = settings_help


def run(
    args: argparse.Namespace, output: Output, kind: Literal["new", "extend", "anneal"] = "new"
) -> int:
    """Start, resume, extend or anneal a run, and return the exit code."""
    start_time = time.perf_counter()
    is_new = kind == "new"
    if is_new and args.base:
        from pretrain.data.format import is_prepared

        files = (Path(args.base) / name for name in (CONFIG, CHECKPOINT_MANIFEST))
        is_model = any(file.is_file() for file in files) and not is_prepared(args.base)
        section, key = ("train", "init_from") if is_model else ("data", "base")
        given = args.overrides.get(section, {})
        args.overrides = {**args.overrides, section: {**given, key: args.base}}
    if is_new and args.profile:
        if args.resume or args.run:
            raise ValueError("--profile must come without --resume and --run: it starts no run")
        return _profile(args, output)
    from pretrain.runner.start import Request, start

    request = Request(
        kind="resume" if is_new and args.resume else kind,
        targets=args.target if is_new else (),
        overrides=args.overrides,
        folder=Path(args.run) if args.run else None,
        accepted=tuple(args.accept or ()),
        json=args.json,
        stream=output.stream,
        start_time=start_time,
    )
    result = start(request)
    if result.is_main:
        output.result(result.to_json())
    return result.exit_code


def _profile(args: argparse.Namespace, output: Output) -> int:
    """Measure the parts of a training step."""
    from pretrain.runner.launch import open_world_of
    from pretrain.runner.request import compose_target, errors_of_machine, read_target
    from pretrain.runner.text import open_text

    _, layers = read_target(*args.target)
    config = compose_target(args.target, layers, args.overrides, rules=errors_of_machine)
    data = open_text(config, output.log)
    # Torch's profiler prints to standard error when it starts and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from pretrain.train.profile import lines, profile_steps

    profile = profile_steps(config, data, open_world_of(config, alone=True))
    for line in lines(profile):
        output.log(line)
    output.result(asdict(profile))
    return 0
