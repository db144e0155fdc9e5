"""Train a model: on the bundled corpus, a recipe, a config file, or any text.

pretrain train                        the recipe `english`: a GPT learns English in a few minutes
pretrain train my.txt                 the same settings on your own file or folder
pretrain train --resume               go on with the run that was begun last
pretrain train --train.steps 200 --model.d_model 64
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.models import first_weights, with_first_weights
from pretrain.cli.output import Output
from pretrain.cli.places import ASKED, new_run_folder, newest_run, prepared, read_target
from pretrain.cli.settings import settings_help
from pretrain.config import Layer, RunConfig, compose, parse_overrides, read_file, to_dict, to_yaml
from pretrain.corpus import list_files
from pretrain.data.shards import PreparedData, is_prepared
from pretrain.report import require_packages
from pretrain.train.records import write_text
from pretrain.train.windows import check_windows

if TYPE_CHECKING:
    from pretrain.checkpoint import Checkpoint
    from pretrain.train.screen import Screen
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
    parser.epilog = settings_help()


def run(arguments: argparse.Namespace, output: Output) -> int:
    began = time.perf_counter()
    overrides = parse_overrides(arguments.settings)
    if arguments.resume:
        folder = Path(arguments.run) if arguments.run else newest_run()
        return _resume(folder, arguments.target, overrides, output, began)
    name, layers = read_target(arguments.target)
    # What a recipe says of the architecture gives way to train.init_from; what the user says must
    # fit it.
    n_below = 0 if (arguments.target or "").lower().endswith((".yaml", ".yml")) else len(layers)
    above = [*layers[n_below:], overrides]
    config = _with_whole_path(with_first_weights(layers[:n_below], above, also=_mistakes_here))
    return _start(config, new_run_folder(name, arguments.run), output, began)


def _start(config: RunConfig, folder: Path, output: Output, began: float) -> int:
    """Begin a run. From the first moment its folder says what was asked for, so that a run that is
    killed before anything could be decided can be resumed too."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    with _lock(folder, output):
        write_text(folder / ASKED, to_yaml(config))
        try:
            data = _prepare(config, output)
            check_windows(config.model, config.train, n_tokens=data.shortest_tokens)
            config, world, screen = _decide(config, folder, data, output)
        except BaseException:
            _take_back(folder, new)
            raise
        return _train(config, folder, data, world, screen, output, began, resume_from=None)


def _take_back(folder: Path, new: list[Path]) -> None:
    """Leave nothing of a run that could not begin, and none of the `new` folders."""
    (folder / ASKED).unlink(missing_ok=True)
    (folder / "run.lock").unlink(missing_ok=True)
    with suppress(OSError):
        for each in new:
            each.rmdir()


def _mistakes_here(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What a config cannot know of itself: whether this machine has its texts and packages, and
    whether a new run has an end."""
    for path in config.data.paths:
        try:
            if not is_prepared(path):
                list_files(path)
        except ValueError as error:
            yield "data.source", str(error)
    for tracker in config.report.to:
        try:
            require_packages([tracker])
        except ValueError as error:
            yield "report.to", str(error)
    has_end = config.train.steps is not None or config.train.minutes is not None
    # Sources of a list may be asked for as epochs, which end too.
    if not has_end and isinstance(config.data.source, str):
        yield (
            "train.steps train.minutes data.source",
            "nothing says how long to train: give train.steps or train.minutes",
        )


def _with_whole_path(config: RunConfig) -> RunConfig:
    """The source as an absolute path, so that a resume from another folder finds it."""
    texts = tuple(_whole(path) for path in config.corpus.evaluation_texts)
    source = config.data.source
    if isinstance(source, str):
        source = _whole(source)
    else:
        source = tuple(replace(entry, path=_whole(entry.path)) for entry in source)
    return replace(
        config,
        data=replace(config.data, source=source),
        corpus=replace(config.corpus, evaluation_texts=texts),
    )


def _whole(path: str) -> str:
    return path if path == "bundled" else str(Path(path).resolve())


def _prepare(config: RunConfig, output: Output) -> PreparedData:
    output.say(f"text: {', '.join(config.data.paths)}")
    return prepared(config, progress=output.stages())


def _decide(
    config: RunConfig, folder: Path, data: PreparedData, output: Output
) -> tuple[RunConfig, World, Screen]:
    """Fill what the config left open, and write it down, never to be decided again."""
    from pretrain.train.decide import decide
    from pretrain.train.fingerprint import fingerprint
    from pretrain.train.screen import Screen
    from pretrain.world import open_world

    world = open_world(
        config.train.device,
        threads=config.train.threads,
        deterministic=config.train.deterministic,
    )
    screen = Screen(output.people)
    if config.train.steps is None and config.train.minutes is not None:
        screen.line(f"measuring how many steps fit into {config.train.minutes:g} min ...")
    decided = decide(
        data=data,
        model=config.model,
        optimizer=config.optimizer,
        schedule=config.schedule,
        train=config.train,
        world=world,
    )
    config = replace(config, model=decided.model, schedule=decided.schedule, train=decided.train)
    data.tokenizer().save(folder / "tokenizer")
    text = to_yaml(config)
    _write_environment(folder, text, world, fingerprint(data, world, first_weights(config)))
    # Last: from now on a resume goes by it.
    write_text(folder / "config.yaml", text)
    (folder / ASKED).unlink()
    return config, world, screen


@contextmanager
def _lock(folder: Path, output: Output) -> Iterator[None]:
    """Be the only one who writes into the run."""
    from pretrain.checkpoint import RunLock

    with RunLock(folder) as lock:
        if lock.warning is not None:
            output.say(f"note: {lock.warning}")
        yield


def _resume(
    folder: Path, target: str | None, overrides: Layer, output: Output, began: float
) -> int:
    if not (folder / "config.yaml").is_file():
        if not (folder / ASKED).is_file():
            raise ValueError(f"{folder} is not a run directory: it has no config.yaml")
        output.say(f"{folder} was stopped before anything was decided: it starts anew")
        config = compose([read_file(folder / ASKED)])
        _refuse_other_settings(config, target, overrides)
        return _start(config, folder, output, began)
    if not (folder / "environment.json").is_file():
        raise ValueError(
            f"{folder} was imported, not trained; train on from it with --train.init_from {folder}"
        )
    config = compose([read_file(folder / "config.yaml")])
    _refuse_other_settings(config, target, overrides)
    require_packages(config.report.to)
    if (folder / "summary.json").is_file():
        output.say(f"{folder} is finished: there is nothing left to train")
        output.result({"run": str(folder), **_read_summary(folder)})
        return 0
    with _lock(folder, output):
        return resume(config, folder, output, began)


def resume(
    config: RunConfig,
    folder: Path,
    output: Output,
    began: float,
    *,
    stop_after: int | None = None,
    die_after: int | None = None,
) -> int:
    """Go on with a run whose settings are decided, from its newest whole checkpoint."""
    data = _prepare(config, output)

    from pretrain.train.fingerprint import fingerprint, refuse_changes
    from pretrain.train.run import newest_of
    from pretrain.train.screen import Screen
    from pretrain.world import open_world

    world = open_world(
        config.train.device,
        threads=config.train.threads,
        deterministic=config.train.deterministic,
    )
    screen = Screen(output.people)
    environment = read_environment(folder)
    checkpoint, complaints = newest_of(folder, run=environment["run"])
    for complaint in complaints:
        screen.line(complaint, style="bold red")
    if checkpoint is None and complaints:
        raise ValueError(f"no checkpoint of {folder} is whole; nothing can be resumed")
    begun_with = environment["fingerprint"]
    if checkpoint is not None:
        begun_with = checkpoint.state["fingerprint"]
    refuse_changes(begun_with, fingerprint(data, world, first_weights(config)))
    screen.line(_where_it_goes_on(folder, checkpoint))
    return _train(
        config,
        folder,
        data,
        world,
        screen,
        output,
        began,
        resume_from=checkpoint,
        stop_after=stop_after,
        die_after=die_after,
    )


def _where_it_goes_on(folder: Path, checkpoint: Checkpoint | None) -> str:
    from pretrain.train.records import Records

    made = max((record["step"] for record in Records(folder).metrics()), default=0)
    if checkpoint is None:
        text, lost = f"{folder} has no checkpoint yet: it starts anew, as it was decided", made
    else:
        text, lost = f"resuming {folder} after step {checkpoint.step:,}", made - checkpoint.step
    return text + (f"; {lost:,} steps were made after it, and are made again" * (lost > 0))


def _refuse_other_settings(config: RunConfig, target: str | None, overrides: Layer) -> None:
    """A resume repeats the run's own settings or none: anything else would be another run."""
    layers = [] if target is None else read_target(target)[1]
    asked = compose([*layers, overrides])
    stored, wanted = to_dict(config), to_dict(asked)
    changes = []
    for layer in (*layers, overrides):
        for section, keys in layer.items():
            for key in keys:
                old, new = stored[section][key], wanted[section][key]
                if new is not None and new != old:
                    changes.append(f"{section}.{key}: {old} -> {new}")
    if changes:
        raise ValueError(
            "a resume goes on with the run's own settings, but these differ: "
            + "; ".join(dict.fromkeys(changes))
        )


def _train(
    config: RunConfig,
    folder: Path,
    data: PreparedData,
    world: World,
    screen: Screen,
    output: Output,
    began: float,
    *,
    resume_from: Checkpoint | None,
    stop_after: int | None = None,
    die_after: int | None = None,
) -> int:
    from pretrain.report import write_report
    from pretrain.train.fingerprint import fingerprint
    from pretrain.train.loop import train
    from pretrain.train.overview import show_plan, show_summary

    show_plan(screen, data=data, model=config.model, settings=config.train, world=world)
    _follow(config, folder)
    start = first_weights(config)
    code = train(
        folder,
        data=data,
        model=config.model,
        optimizer=config.optimizer,
        schedule=config.schedule,
        settings=config.train,
        world=world,
        screen=screen,
        identity={
            "run": read_environment(folder)["run"],
            "fingerprint": fingerprint(data, world, start),
        },
        began=began,
        first_weights=start,
        resume_from=resume_from,
        stop_after=stop_after,
        die_after=die_after,
    )
    report = write_report(folder)
    if not (folder / "summary.json").is_file():
        go_on = f"pretrain train --resume --run {shlex.quote(str(folder))}"
        screen.line(f"stopped and saved; go on with: {go_on}")
        output.result({"run": str(folder), "stopped": True, "exit_code": code})
        return code
    summary = _read_summary(folder)
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


def _read_summary(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return content


def read_environment(folder: Path) -> dict[str, Any]:
    """What a run wrote down of itself and its surroundings when it began."""
    content = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not {"run", "fingerprint"} <= content.keys():
        raise ValueError(f"{folder / 'environment.json'} is not what a run writes")
    return content


def _write_environment(
    folder: Path, config: str, world: World, fingerprint: dict[str, Any]
) -> None:
    from pretrain import __version__
    from pretrain.train.records import write_json
    from pretrain.world import describe_machine

    # Runs of one name are one run: the same settings and surroundings give the same numbers.
    named = config + json.dumps(fingerprint, sort_keys=True)
    write_json(
        folder / "environment.json",
        {
            "run": hashlib.sha256(named.encode()).hexdigest()[:16],
            "pretrain": __version__,
            **describe_machine(),
            "device": world.device.type,
            "threads": world.threads,
            "git": _git_revision(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": shlex.join(["pretrain", *sys.argv[1:]]),
            "fingerprint": fingerprint,
        },
    )


def _git_revision() -> str | None:
    """The revision of the code that runs, when it runs from a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
