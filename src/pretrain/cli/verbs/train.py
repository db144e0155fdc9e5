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
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.environment import only_writer, read_environment, write_environment
from pretrain.cli.machine import mistakes_here, with_whole_paths
from pretrain.cli.models import first_weights, with_first_weights
from pretrain.cli.output import Output
from pretrain.cli.places import ASKED, new_run_folder, newest_run, prepared, read_target
from pretrain.cli.resuming import (
    Resumption,
    asked_settings,
    is_finished,
    put_tokenizer,
    read_run,
    report_is_due,
    set_aside,
    settings_of,
    summary_of,
    with_settings,
)
from pretrain.cli.scoring import read_followed
from pretrain.cli.settings import settings_help
from pretrain.config import (
    Layer,
    Rules,
    RunConfig,
    compose,
    parse_overrides,
    read_file,
    to_yaml,
)
from pretrain.data.durable import replace_file
from pretrain.data.shards import PreparedData
from pretrain.report import require_packages, write_report
from pretrain.train.changes import check_accepted, differences
from pretrain.train.records import Records
from pretrain.train.signals import TO_THE_END, Ends
from pretrain.train.windows import check_windows

if TYPE_CHECKING:
    from pretrain.checkpoint import Checkpoint
    from pretrain.cli.continuing import Continuation
    from pretrain.evaluate.following import Followed
    from pretrain.world import World

TAKES_SETTINGS = True


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
    parser.epilog = settings_help()


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
        return resume(folder, target, overrides, output, began, accepted=accepted)
    if arguments.accept:
        raise ValueError("--accept goes with --resume: a new run has nothing that could change")
    name, layers = read_target(arguments.target)
    config = _composed(arguments.target, layers, overrides, also=mistakes_here)
    if arguments.profile:
        return _profile(config, output)
    return _start(with_whole_paths(config), new_run_folder(name, arguments.run), output, began)


def _start(config: RunConfig, folder: Path, output: Output, began: float) -> int:
    """Begin a run. From the first moment its folder says what was asked for, so that a run that is
    killed before anything could be decided can be resumed too."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    with only_writer(folder, output):
        replace_file(folder / ASKED, to_yaml(config).encode())
        try:
            followed = read_followed(config.evaluate)
            data = _prepare(config, output)
            check_windows(config.model, config.train, n_tokens=data.shortest_tokens)
            config, world = _decide(config, folder, data, followed, output)
        except (ValueError, KeyboardInterrupt):  # a full disk is to be resumed
            _take_back(folder, new)
            raise
        return _train(
            config, folder, data, world, output, began, followed=followed, resume_from=None
        )


def _profile(config: RunConfig, output: Output) -> int:
    data = _prepare(config, output)
    # Torch's profiler says on standard error when it begins and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from pretrain.train.profile import lines, profile_steps

    found = profile_steps(
        data=data,
        model=config.model,
        optimizer=config.optimizer,
        schedule=config.schedule,
        train=config.train,
        world=_open_world(config),
    )
    for line in lines(found):
        output.say(line)
    output.result(asdict(found))
    return 0


def _open_world(config: RunConfig) -> World:
    from pretrain.world import open_world

    train = config.train
    return open_world(train.device, threads=train.threads, deterministic=train.deterministic)


def _take_back(folder: Path, new: list[Path]) -> None:
    """Leave nothing of a run that could not begin, and none of the `new` folders."""
    (folder / ASKED).unlink(missing_ok=True)
    (folder / "run.lock").unlink(missing_ok=True)
    with suppress(OSError):
        for each in new:
            each.rmdir()


def _composed(
    target: str | None, layers: list[Layer], overrides: Layer, *, also: Rules | None = None
) -> RunConfig:
    # What a recipe says of the architecture gives way to train.init_from; what the user says must
    # fit it.
    n_below = 0 if (target or "").lower().endswith((".yaml", ".yml")) else len(layers)
    return with_first_weights(layers[:n_below], [*layers[n_below:], overrides], also=also)


def _prepare(config: RunConfig, output: Output) -> PreparedData:
    output.say(f"text: {', '.join(config.data.paths)}")
    return prepared(config, progress=output.stages())


def _decide(
    config: RunConfig,
    folder: Path,
    data: PreparedData,
    followed: list[Followed],
    output: Output,
) -> tuple[RunConfig, World]:
    """Fill what the config left open, and write it down, never to be decided again."""
    from pretrain.train.decide import decide

    world = _open_world(config)
    if config.train.steps is None and config.train.minutes is not None:
        output.say(f"measuring how many steps fit into {config.train.minutes:g} min ...")
    decided = decide(
        data=data,
        model=config.model,
        optimizer=config.optimizer,
        schedule=config.schedule,
        train=config.train,
        world=world,
        evaluate=config.evaluate,
        followed=followed,
    )
    sections = {each.name: getattr(decided, each.name) for each in fields(decided)}
    config = replace(config, **sections)
    data.tokenizer().save(folder / "tokenizer")
    text = to_yaml(config)
    write_environment(folder, text, world, _fingerprint(config, data, world))
    # Last: from now on a resume goes by it.
    replace_file(folder / "config.yaml", text.encode())
    (folder / ASKED).unlink()
    return config, world


def resume(
    folder: Path,
    target: str | None,
    overrides: Layer,
    output: Output,
    began: float,
    *,
    accepted: tuple[str, ...] = (),
    continuation: Continuation | None = None,
    ends: Ends = TO_THE_END,
) -> int:
    """Go on with a run; with a `continuation`, with a finished one, to more steps."""
    if (folder / ASKED).is_file() and not (folder / "config.yaml").is_file():
        output.say(f"{folder} was stopped before anything was decided: it starts anew")
        asked = compose([read_file(folder / ASKED)])
        return _start(_wanted(asked, target, overrides), folder, output, began)
    stored = read_run(folder)
    wanted = _wanted(stored, target, overrides)
    require_packages(wanted.report.to)
    followed = read_followed(wanted.evaluate)
    if continuation is not None:
        continuation.check(folder, wanted)
    elif is_finished(folder, stored):
        changes = differences(settings_of(stored), settings_of(wanted))
        check_accepted(changes, {c.word for c in changes}.intersection(accepted))
        output.say(f"{folder} is finished: there is nothing left to train")
        if report_is_due(folder):  # it died in between
            write_report(folder)
        output.result({"run": str(folder), **summary_of(folder)})
        return 0
    with only_writer(folder, output):
        checkpoint = _newest(folder, output) if continuation is None else None
        if continuation is not None:
            checkpoint = continuation.checkpoint(folder)
        by = "accept" if continuation is None else continuation.verb
        found = Resumption(folder, stored, wanted, checkpoint, accepted=accepted, by=by)
        found.refuse_other_text()
        data = _prepare(found.wanted, output)
        final, world = _settled(found, continuation, data, followed, output)
        put_tokenizer(folder, data, output)
        set_aside(folder)
        output.say(_where_it_goes_on(folder, checkpoint))
        return _train(
            final,
            folder,
            data,
            world,
            output,
            began,
            followed=followed,
            resume_from=checkpoint,
            ends=ends,
        )


def _settled(
    found: Resumption,
    continuation: Continuation | None,
    data: PreparedData,
    followed: list[Followed],
    output: Output,
) -> tuple[RunConfig, World]:
    """The settings under which the run goes on, with all that was accepted on the disk."""
    from pretrain.train.fingerprint import fingerprint

    world = _open_world(found.wanted)
    changes = found.settle(fingerprint(data, world, first_weights(found.wanted)), data)
    final = found.wanted
    if continuation is not None:
        final = continuation.extended(final, found.step)
        continuation.refuse_other_order(data, found.wanted, final)
    check_windows(final.model, final.train, n_tokens=data.shortest_tokens)
    if followed and final.evaluate.every is None:  # the run follows nothing yet
        final = _with_interval(final, data, world, followed)
    found.write(final, changes, output)
    return final, world


def _with_interval(
    config: RunConfig, data: PreparedData, world: World, followed: list[Followed]
) -> RunConfig:
    from pretrain.train.decide import measure_pace, task_interval

    pace = measure_pace(data, config.model, config.optimizer, config.train, world, followed)
    every = task_interval(config.train, pace)
    return replace(config, evaluate=replace(config.evaluate, every=every))


def _where_it_goes_on(folder: Path, checkpoint: Checkpoint | None) -> str:
    made = max((record["step"] for record in Records(folder).metrics()), default=0)
    if checkpoint is None:
        text, lost = f"{folder} has no checkpoint yet: it starts anew, as it was decided", made
    else:
        text, lost = f"resuming {folder} after step {checkpoint.step:,}", made - checkpoint.step
    return text + (f"; {lost:,} steps were made after it, and are made again" * (lost > 0))


def _wanted(stored: RunConfig, target: str | None, overrides: Layer) -> RunConfig:
    """The run's settings, and over them what the command says."""
    layers = [] if target is None else read_target(target)[1]
    asked = with_whole_paths(_composed(target, layers, overrides))
    return with_settings(stored, asked_settings(asked, [*layers, overrides]))


def _newest(folder: Path, output: Output) -> Checkpoint | None:
    from pretrain.train.run import newest_of

    checkpoint, complaints = newest_of(folder, run=read_environment(folder)["run"])
    for complaint in complaints:
        output.say(complaint)
    if checkpoint is None and complaints:
        raise ValueError(f"no checkpoint of {folder} is whole; nothing can be resumed")
    return checkpoint


def _fingerprint(config: RunConfig, data: PreparedData, world: World) -> dict[str, Any]:
    """All that the run's numbers hang on; its settings are among it, for a config.yaml that was
    edited since is another config."""
    from pretrain.train.fingerprint import fingerprint

    return {**fingerprint(data, world, first_weights(config)), "settings": settings_of(config)}


def _train(
    config: RunConfig,
    folder: Path,
    data: PreparedData,
    world: World,
    output: Output,
    began: float,
    *,
    followed: list[Followed],
    resume_from: Checkpoint | None,
    ends: Ends = TO_THE_END,
) -> int:
    from pretrain.train.loop import train
    from pretrain.train.overview import show_followed, show_plan, show_summary
    from pretrain.train.screen import Screen

    screen = Screen(output.people)
    show_plan(screen, data=data, model=config.model, settings=config.train, world=world)
    show_followed(screen, followed, every=config.evaluate.every, steps=config.train.steps)
    _follow(config, folder)
    run = read_environment(folder)["run"]
    code = train(
        folder,
        data=data,
        model=config.model,
        optimizer=config.optimizer,
        schedule=config.schedule,
        settings=config.train,
        world=world,
        screen=screen,
        identity={"run": run, "fingerprint": _fingerprint(config, data, world)},
        began=began,
        first_weights=first_weights(config),
        resume_from=resume_from,
        followed=followed,
        asked_every=config.evaluate.every,
        ends=ends,
    )
    report = write_report(folder)
    if not (folder / "summary.json").is_file():
        go_on = f"pretrain train --resume --run {shlex.quote(str(folder))}"
        screen.line(f"stopped and saved; go on with: {go_on}")
        output.result({"run": str(folder), "stopped": True, "exit_code": code})
        return code
    summary = summary_of(folder)
    show_summary(screen, summary, folder=folder, report=report)
    output.result({"run": str(folder), "report": str(report), **summary})
    return 0


def _follow(config: RunConfig, folder: Path) -> None:
    """Start the trackers of report.to as a process of their own that reads metrics.jsonl."""
    if not config.report.to:
        return
    words = [sys.executable, "-m", "pretrain.report.trackers", str(folder)]
    words += ["--to", *config.report.to, "--parent", str(os.getpid())]
    # A session of its own: Ctrl-C is for the training, and the last lines must still be sent.
    subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
