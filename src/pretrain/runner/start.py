"""Start, resume, extend or anneal a run: a request -> a running loop.

new              requested settings -> resolve -> config.yaml -> train
resume           load_previous -> check the differences -> record them -> train
extend, anneal   the same from the last checkpoint of a finished run, with more steps

Where the settings name several processes, `start` launches them, and each comes here again with the
same request. What a resume checks is listed in `checks`.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pretrain import __version__
from pretrain.config import Layer, RunConfig, compose, read_file, to_yaml
from pretrain.data.format import PreparedData
from pretrain.evaluate.task_files import read_in_loop_tasks
from pretrain.fileio import replace_file
from pretrain.machine import n_processes, n_restarts
from pretrain.parallel.config import ParallelConfig
from pretrain.report.page import write_report
from pretrain.run.directory import (
    CHECKPOINTS,
    CONFIG,
    LOCK,
    REPORT,
    SUMMARY,
    TOKENIZER,
    archive_results,
    read_environment,
    read_json,
    write_environment,
)
from pretrain.run.log import RunLog
from pretrain.runner.checks import (
    check_axes,
    check_changes,
    check_finished_run,
    check_fits_text,
    check_packages_and_tasks,
    check_text_settings,
    newest_checkpoint,
    only_writer,
    read_run_config,
    requested_config,
)
from pretrain.runner.extend import (
    Extension,
    check_extension,
    check_seen_samples,
    extended_config,
    is_under_way,
    last_checkpoint,
    requested_extension,
)
from pretrain.runner.launch import (
    check_same_on_all_ranks,
    join_processes,
    launch,
    n_processes_of_run,
    naming_lost_ranks,
    open_world_of,
)
from pretrain.runner.previous import (
    Previous,
    is_finished,
    load_previous,
    repair_tokenizer,
    settings_of,
    with_schedule_history,
    with_settings,
    write_changes,
)
from pretrain.runner.request import (
    REQUESTED_NAMES,
    compose_target,
    errors_of_machine,
    initial_checkpoint,
    is_started,
    new_run_folder,
    newest_run,
    read_target,
    requested_file,
    with_absolute_paths,
)
from pretrain.runner.text import Log, log_to, open_text, prepared_text
from pretrain.train.signals import PlannedStop

if TYPE_CHECKING:
    from pretrain.checkpoint.load import Checkpoint
    from pretrain.distributed import World
    from pretrain.evaluate.task_files import EvalTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a command, or a call of the library, requests."""

    kind: Literal["new", "resume", "extend", "anneal"] = "new"
    target: str | None = None
    """recipe, YAML file or text"""
    overrides: Layer = field(default_factory=dict)
    """settings over those of the target, or over those of the run that continues"""
    folder: Path | None = None
    """run directory; None for a new one under runs/, or for the newest to resume"""
    accepted: tuple[str, ...] = ()
    """changes that a resume accepts, by the names that its error gives them"""
    json: bool = False
    """whether processes that are launched print the result as JSON"""
    planned_stop: PlannedStop = field(default_factory=PlannedStop)
    start_time: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    folder: Path
    exit_code: int = 0
    """0 finished; 130 or 143 stopped by a signal, saved and resumable"""
    summary: Mapping[str, Any] | None = None
    """summary.json; None for a run that was stopped"""
    report: Path | None = None
    """report.html, if it was written now"""
    is_main: bool = True
    """False on ranks other than 0, and where launched processes have reported the result"""

    def to_json(self) -> dict[str, Any]:
        """Return the object that --json prints."""
        if self.summary is None:
            return {"run": str(self.folder), "stopped": True, "exit_code": self.exit_code}
        report = {} if self.report is None else {"report": str(self.report)}
        return {"run": str(self.folder), **report, **self.summary}


def start(request: Request, stream: TextIO) -> RunResult:
    """Do what is requested, with messages on `stream`, in this process or in several that it
    launches. ValueError for what the user can correct; ProcessFailed where a process fails."""
    if request.kind == "new":
        return _start_new(request, stream)
    folder = newest_run() if request.folder is None else request.folder

    extension = None
    if request.kind != "resume":
        if (folder / "manifest.json").is_file():
            raise ValueError(
                f"{folder} is a checkpoint; {request.kind} continues a full run, from its last "
                "step. Start another run from an earlier state: pretrain train "
                f"--train.init_from {folder}"
            )
        stored = read_run_config(folder)
        extension = requested_extension(request.kind, stored, request.overrides)
    if (n := n_processes_of_run(folder, request.overrides)) > 1:
        return _launch(request, folder, n, stream)
    if extension is not None and is_under_way(folder, stored, extension):
        extension = None
    return resume(request, folder, stream, extension)


# --- a new run ---------------------------------------------------------------------------------


def _start_new(request: Request, stream: TextIO) -> RunResult:
    """Start a new run, or resume it where torchrun starts it again."""
    if request.accepted:
        raise ValueError("--accept must come with --resume: a new run has nothing that changed")
    name, layers = read_target(request.target)
    config = compose_target(request.target, layers, request.overrides, rules=errors_of_machine)
    if config.parallel.processes > 1 and n_processes() == 1:
        folder = new_run_folder(name, request.folder)
        return _launch(request, folder, config.parallel.processes, stream)
    if n_restarts():
        if request.folder is None:
            raise ValueError(
                "a restart finds its run by --run DIR; give it to torchrun's command too"
            )
        if is_started(request.folder):
            again = Request(kind="resume", folder=request.folder, start_time=request.start_time)
            return resume(again, request.folder, stream)

    world, stream = join_processes(config, stream)
    is_main = world is None or world.is_main
    folder = new_run_folder(name, request.folder) if is_main else Path()
    if world is not None:
        folder = Path(world.broadcast_str(str(folder)))
    return _train_from_scratch(request, with_absolute_paths(config), folder, stream, world)


def _train_from_scratch(
    request: Request, config: RunConfig, folder: Path, stream: TextIO, world: World | None
) -> RunResult:
    """Resolve the settings and train. The folder has the requested settings from the start, so
    that a run that is killed before they are resolved can be resumed too."""
    log = log_to(stream)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    is_main = world is None or world.is_main
    with only_writer(folder, log) if is_main else nullcontext():
        if is_main:
            replace_file(folder / REQUESTED_NAMES[0], to_yaml(config).encode())
        try:
            tasks = read_in_loop_tasks(config.evaluate)
            data = open_text(config, log, world)
            check_fits_text(config, data)  # before torch is imported
            world = world or open_world_of(config)
            config, identity = _resolve(config, folder, data, tasks, log, world)
        except (ValueError, KeyboardInterrupt):  # not a full disk, after which it is resumed
            if is_main:  # remove its files, and the folders that were made for it
                for name in (*REQUESTED_NAMES, LOCK):
                    (folder / name).unlink(missing_ok=True)
                with suppress(OSError):
                    for path in new_folders:
                        path.rmdir()
            raise
        return _train(request, config, folder, data, tasks, stream, world, identity)


def _resolve(
    config: RunConfig,
    folder: Path,
    data: PreparedData,
    tasks: list[EvalTask],
    log: Log,
    world: World,
) -> tuple[RunConfig, dict[str, Any]]:
    """Fill every empty setting and write config.yaml, from which a resume reads them. Returns the
    config and the run's identity."""
    from pretrain.distributed import describe_machine
    from pretrain.train.resolve import resolve

    if config.train.steps is None and config.train.minutes is not None:
        log(f"measuring how many steps fit into {config.train.minutes:g} min ...")
    config = resolve(config, data, world, tasks)
    fingerprint = {**_fingerprint_of(config, data, world), "settings": settings_of(config)}
    check_same_on_all_ranks(world, fingerprint)
    if world.is_main:
        data.tokenizer().save(folder / TOKENIZER)
        text = to_yaml(config)
        write_environment(
            folder,
            text,
            fingerprint,
            machine=describe_machine(),
            device=world.device.type,
            threads=world.threads,
        )
        # Last, since a resume reads nothing else once it is there.
        replace_file(folder / CONFIG, text.encode())
        for name in REQUESTED_NAMES:
            (folder / name).unlink(missing_ok=True)
    world.wait_for_main()
    return config, {"run": read_environment(folder)["run"], "fingerprint": fingerprint}


# --- a run that continues ----------------------------------------------------------------------


def resume(
    request: Request, folder: Path, stream: TextIO, extension: Extension | None = None
) -> RunResult:
    """Continue a run in this process: from its newest checkpoint, or with an `extension` from the
    last one of a finished run. The order is that of `checks.RESUME_CHECKS`."""
    accepted = request.accepted
    overrides = request.overrides if extension is None else extension.other_overrides
    if (path := requested_file(folder)) is not None:
        stored = compose([read_file(path)])
        config = requested_config(stored, request.target, overrides)
        check_axes(config)
        world, stream = join_processes(config, stream)
        log_to(stream)(
            f"{folder} was stopped before its settings were resolved; it starts from scratch"
        )
        return _train_from_scratch(request, config, folder, stream, world)

    stored = read_run_config(folder)
    requested = requested_config(stored, request.target, overrides)
    check_axes(requested)
    tasks = check_packages_and_tasks(requested)
    if extension is not None:
        check_extension(folder, requested, extension)
    elif is_finished(folder, stored):
        check_finished_run(stored, requested, accepted)
        return _report_finished(folder, requested, stream)

    joined, stream = join_processes(requested, stream)
    log = log_to(stream)
    if joined is not None and not joined.is_main:
        return _resume_on_other_rank(request, folder, stream, joined)
    with only_writer(folder, log):
        environment = read_environment(folder)
        if extension is None:
            checkpoint = newest_checkpoint(folder, environment["run"], log)
        else:
            checkpoint = last_checkpoint(folder)
        command = "resume" if extension is None else extension.command
        started_with = environment["fingerprint"]
        previous = load_previous(
            folder, stored, checkpoint, started_with=started_with, command=command
        )
        requested = with_schedule_history(requested, previous)
        check_text_settings(previous, requested, accepted)
        data = open_text(requested, log)
        world = joined or open_world_of(requested)
        fingerprint = _fingerprint_of(requested, data, world)
        changes = check_changes(previous, requested, fingerprint, data, accepted)

        config = _resolve_resumed(requested, previous, extension, data, tasks, world)
        write_changes(previous, config, changes, command=command, log=log)
        repair_tokenizer(folder, data, log)
        archive_results(folder)
        log(_describe_resume(folder, checkpoint))
        world.wait_for_main()
        world.broadcast_str("" if checkpoint is None else checkpoint.path.name)
        fingerprint["settings"] = settings_of(config)
        check_same_on_all_ranks(world, fingerprint)
        identity = {"run": environment["run"], "fingerprint": fingerprint}
        return _train(request, config, folder, data, tasks, stream, world, identity, checkpoint)


def _resolve_resumed(
    requested: RunConfig,
    previous: Previous,
    extension: Extension | None,
    data: PreparedData,
    tasks: list[EvalTask],
    world: World,
) -> RunConfig:
    """Return the settings under which the run continues: with the accepted device and threads, the
    added steps, and an interval for in-loop tasks if it had none before."""
    here = {"train.threads": world.threads, "train.device": world.device.type}
    config = with_settings(requested, here)
    if extension is not None:
        before = config
        config = extended_config(config, extension, previous.step)
        check_seen_samples(data, before, config)
    check_fits_text(config, data)
    if not tasks or config.evaluate.every is not None:
        return config

    from pretrain.train.resolve import measure_pace, task_interval

    if world.size > 1:  # rank 0 cannot time a step of all ranks by itself
        raise ValueError(
            "tasks that a run of several processes evaluates for the first time need "
            "--evaluate.every N: their interval is measured only at the start of a run"
        )
    alone = replace(config, parallel=ParallelConfig())
    pace = measure_pace(alone, data, world.single_process(), tasks)
    every = task_interval(config.train, pace)
    return replace(config, evaluate=replace(config.evaluate, every=every))


def _resume_on_other_rank(
    request: Request, folder: Path, stream: TextIO, world: World
) -> RunResult:
    """Continue on a rank other than 0, with the settings that rank 0 has written."""
    from pretrain.checkpoint.load import open_checkpoint

    world.wait_for_main()
    name = world.broadcast_str("")
    config = read_run_config(folder)
    data = prepared_text(config)
    fingerprint = {**_fingerprint_of(config, data, world), "settings": settings_of(config)}
    check_same_on_all_ranks(world, fingerprint)
    identity = {"run": read_environment(folder)["run"], "fingerprint": fingerprint}
    tasks = read_in_loop_tasks(config.evaluate)
    checkpoint = open_checkpoint(folder / CHECKPOINTS / name) if name else None
    return _train(request, config, folder, data, tasks, stream, world, identity, checkpoint)


def _report_finished(folder: Path, config: RunConfig, stream: TextIO) -> RunResult:
    """Report that nothing is left to train, and write the report if the run died before it did."""
    world, stream = join_processes(config, stream)
    is_main = world is None or world.is_main
    if is_main:
        log_to(stream)(f"{folder} is finished: there is nothing left to train")
        report, summary = folder / REPORT, folder / SUMMARY
        if not report.is_file() or report.stat().st_mtime < summary.stat().st_mtime:
            write_report(folder)
    if world is not None:
        world.wait_for_main()
        world.leave()
    return RunResult(folder, summary=read_json(folder / SUMMARY), is_main=is_main)


def _describe_resume(folder: Path, checkpoint: Checkpoint | None) -> str:
    """Say where the run continues, and how many steps after the checkpoint are taken again."""
    steps = max((record["step"] for record in RunLog(folder).metrics()), default=0)
    if checkpoint is None:
        n_lost = steps
        text = f"{folder} has no checkpoint yet: it starts from scratch, with its settings"
    else:
        n_lost = steps - checkpoint.step
        text = f"resuming {folder} after step {checkpoint.step:,}"
    return f"{text}; {n_lost:,} later steps are taken again" if n_lost > 0 else text


# --- training ----------------------------------------------------------------------------------


def _fingerprint_of(config: RunConfig, data: PreparedData, world: World) -> dict[str, Any]:
    """What the numbers of a run depend on besides its config: text, tokenizer, code, versions,
    device and threads. A resume with another one would be another run."""
    import torch

    from pretrain.run.identity import code_hash

    first_weights = initial_checkpoint(config)
    return {
        **({} if first_weights is None else {"first weights": first_weights.sha256}),
        "training text": data.split("train").sha256,
        "held-out text": data.split("val").sha256,
        "tokenizer": data.manifest.tokenizer_sha256,
        "pretrain": __version__,
        "code": code_hash(),
        "torch": torch.__version__,
        "device": world.device.type,
        "threads": world.threads,
    }


def _train(
    request: Request,
    config: RunConfig,
    folder: Path,
    data: PreparedData,
    tasks: list[EvalTask],
    stream: TextIO,
    world: World,
    identity: Mapping[str, Any],
    checkpoint: Checkpoint | None = None,
) -> RunResult:
    """Train a resolved config to its end or to a signal, and write the report."""
    from pretrain.train.console import Console, show_summary
    from pretrain.train.loop import train
    from pretrain.train.state import Run

    console = Console(stream)
    if world.is_main and config.report.to:
        # Trackers read metrics.jsonl in a session of their own: Ctrl-C is for the training, and the
        # last lines must still be sent.
        args = [sys.executable, "-m", "pretrain.report.trackers", str(folder)]
        args += ["--to", *config.report.to, "--parent", str(os.getpid())]
        subprocess.Popen(args, stdin=subprocess.DEVNULL, start_new_session=True)
    run = Run(
        folder=folder,
        config=config,
        data=data,
        world=world,
        console=console,
        identity=identity,
        tasks=tasks,
        first_weights=initial_checkpoint(config),
        planned_stop=request.planned_stop,
        start_time=request.start_time,
    )
    with naming_lost_ranks(world, config.parallel.timeout_seconds):
        run.open(checkpoint)
        exit_code = train(run)
    world.leave()
    if not world.is_main:
        return RunResult(folder, exit_code, is_main=False)
    report = write_report(folder)
    if not (folder / SUMMARY).is_file():
        command = f"pretrain train --resume --run {shlex.quote(str(folder))}"
        console.line(f"stopped and saved; continue with: {command}")
        return RunResult(folder, exit_code)
    summary = read_json(folder / SUMMARY)
    show_summary(console, summary, folder=folder, report=report)
    return RunResult(folder, summary=summary, report=report)


# --- several processes -------------------------------------------------------------------------


def _launch(request: Request, folder: Path, n: int, stream: TextIO) -> RunResult:
    """Launch `n` processes with the same request. One that failed after the run had started is
    restarted as a resume."""
    args = _command_line(request, folder)
    resume_args = _command_line(Request(kind="resume", json=request.json), folder)

    def restart_args() -> list[str]:
        if request.kind == "new":
            has_started = is_started(folder)
        elif request.kind == "resume":
            has_started = False  # --accept is still needed
        else:
            has_started = read_run_config(folder).train.steps == request.overrides["train"]["steps"]
        return resume_args if has_started else args

    def saved_checkpoints() -> list[str]:
        return sorted(path.name for path in folder.glob(f"{CHECKPOINTS}/step-*"))

    exit_code = launch(args, restart_args, n, log_to(stream), progress=saved_checkpoints)
    is_done = exit_code == 0 and (folder / SUMMARY).is_file()
    summary = read_json(folder / SUMMARY) if is_done else None
    return RunResult(folder, exit_code, summary, is_main=False)


def _command_line(request: Request, folder: Path) -> list[str]:
    """Return the arguments of `pretrain` for a request."""
    if request.kind in ("extend", "anneal"):
        args = [request.kind, str(folder)]
    else:
        args = ["train", "--run", str(folder)]
        if request.target is not None:
            args.append(request.target)
        if request.kind == "resume":
            args.append("--resume")
    for section, keys in request.overrides.items():
        for key, value in keys.items():
            args.append(f"--{section}.{key}={_yaml_scalar(value)}")
    for word in request.accepted:
        args += ["--accept", word]
    if request.json:
        args.append("--json")
    return args


def _yaml_scalar(value: Any) -> str:
    """Return a value as YAML in one line; JSON is YAML, except for infinity and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{value:+}".replace("inf", ".inf")
    return json.dumps(value, ensure_ascii=False)
