"""Start, resume, extend or anneal a run: a request -> a running loop.

new              requested settings -> resolve -> config.yaml -> train
resume           load_previous -> check the differences -> record them -> train
extend, anneal   the same from the last checkpoint of a finished run, with more steps

Where the settings name several processes, `start` launches them, and each comes here again with the
same request. What a resume checks is listed in `checks`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pretrain import __version__
from pretrain.config import Layer, RunConfig, compose, read_file, to_dict, to_yaml
from pretrain.data.format import PreparedData
from pretrain.evaluate.task_files import read_in_loop_tasks
from pretrain.fileio import read_json, replace_file
from pretrain.machine import n_processes, n_restarts
from pretrain.parallel.config import ParallelConfig
from pretrain.report.page import write_report
from pretrain.run import directory, identity
from pretrain.run.directory import CHECKPOINTS, REQUESTED, SUMMARY, read_environment
from pretrain.run.log import RunLog
from pretrain.runner import checks
from pretrain.runner.launch import (
    ProcessFailed,
    check_same_on_all_ranks,
    join_processes,
    launch,
    naming_lost_ranks,
    open_world_of,
)
from pretrain.runner.request import (
    by_name,
    compose_target,
    errors_of_machine,
    initial_checkpoint,
    is_started,
    is_unresolved,
    new_run_folder,
    newest_run,
    read_target,
    with_absolute_paths,
    with_settings,
)
from pretrain.runner.text import log_to, open_text, prepared_text
from pretrain.train.signals import PlannedStop

if TYPE_CHECKING:
    from pretrain.checkpoint.load import Checkpoint
    from pretrain.distributed import World
    from pretrain.evaluate.task_files import EvalTask

# Restarts in a row without a new checkpoint; an error that repeats so often is not transient.
MAX_RESTARTS = 3


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
    """0 finished; 130, 143 or 138 stopped by Ctrl-C, SIGTERM or SIGUSR1, saved and resumable"""
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
    if request.kind != "resume" and (folder / directory.CHECKPOINT_MANIFEST).is_file():
        raise ValueError(
            f"{folder} is a checkpoint; {request.kind} continues a full run, from its last step. "
            f"Start another run from an earlier state: pretrain train --train.init_from {folder}"
        )
    if request.kind == "resume" and is_unresolved(folder):
        stored = compose([read_file(folder / REQUESTED)])
    else:
        stored = checks.read_run_config(folder)
    if n_processes() == 1 and (n := n_processes_of_run(stored, request.overrides)) > 1:
        return _launch(request, folder, n, stream)
    return _continue(request, folder, stored, stream)


def n_processes_of_run(stored: RunConfig, overrides: Layer) -> int:
    """Return the number of processes of a run that continues with the command's settings."""
    # Nothing else is read from them: whether the rest fits the model is checked later.
    n = overrides.get("parallel", {}).get("processes", stored.parallel.processes)
    return compose([{"parallel": {"processes": n}}]).parallel.processes


@dataclass(slots=True)
class _Session:
    """All that a rank trains a run with."""

    request: Request
    stream: TextIO
    folder: Path
    config: RunConfig
    data: PreparedData
    tasks: list[EvalTask]
    world: World
    checkpoint: Checkpoint | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Return what the numbers of a run depend on besides its config: text, tokenizer, code,
        versions, device and threads. A resume with another one would be another run."""
        import torch

        first_weights = initial_checkpoint(self.config)
        return {
            **({} if first_weights is None else {"first weights": first_weights.sha256}),
            "training text": self.data.split("train").sha256,
            "held-out text": self.data.split("val").sha256,
            "tokenizer": self.data.manifest.tokenizer_sha256,
            "pretrain": __version__,
            "code": identity.code_hash(),
            "torch": torch.__version__,
            "device": self.world.device.type,
            "threads": self.world.threads,
        }

    def agreed_fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint with the settings. ValueError if it is not that of all ranks."""
        agreed = {**self.fingerprint(), "settings": checks.settings_of(self.config)}
        check_same_on_all_ranks(self.world, agreed)
        return agreed

    def train(
        self, fingerprint: Mapping[str, Any], *, write: Callable[[], None] | None = None
    ) -> RunResult:
        """Train to the last step or to a signal, and write the report. `write` records on rank 0
        how the run continues, once the checkpoint is loaded."""
        from pretrain.train.console import Console, show_summary
        from pretrain.train.loop import train
        from pretrain.train.state import Run

        folder, config, world = self.folder, self.config, self.world
        console = Console(self.stream)
        run = Run(
            folder=folder,
            config=config,
            data=self.data,
            world=world,
            console=console,
            identity={"run": read_environment(folder)["run"], "fingerprint": fingerprint},
            tasks=self.tasks,
            first_weights=initial_checkpoint(config),
            planned_stop=self.request.planned_stop,
            start_time=self.request.start_time,
        )
        with naming_lost_ranks(world, config.parallel.timeout_seconds):
            run.open(self.checkpoint)
            if write is not None:
                write()
            if world.is_main and config.report.to:
                # Trackers read metrics.jsonl in a session of their own: Ctrl-C is for the training,
                # and the last lines must still be sent.
                args = [sys.executable, "-m", "pretrain.report.trackers", str(folder)]
                args += ["--to", *config.report.to, "--parent", str(os.getpid())]
                subprocess.Popen(args, stdin=subprocess.DEVNULL, start_new_session=True)
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
            # torchrun may restart with fewer processes; none is launched below it.
            again = Request(
                kind="resume",
                folder=request.folder,
                overrides={"parallel": {"processes": n_processes()}},
                start_time=request.start_time,
            )
            return start(again, stream)

    world, stream = join_processes(config, stream)
    is_main = world is None or world.is_main
    folder = new_run_folder(name, request.folder) if is_main else Path()
    if world is not None:
        folder = Path(world.broadcast_str(str(folder)))
    return _train_from_scratch(request, folder, with_absolute_paths(config), stream, world)


def _train_from_scratch(
    request: Request, folder: Path, config: RunConfig, stream: TextIO, world: World | None
) -> RunResult:
    """Fill every empty setting, write config.yaml, from which a resume reads them, and train. The
    folder has the requested settings from the start, so that a run that is killed before they are
    resolved can be resumed too."""
    log = log_to(stream)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    is_main = world is None or world.is_main
    with checks.only_writer(folder, log) if is_main else nullcontext():
        if is_main:
            replace_file(folder / REQUESTED, to_yaml(config).encode())
        try:
            tasks = read_in_loop_tasks(config.evaluate)
            data = open_text(config, log, world)
            checks.check_fits_text(config, data)  # before torch is imported
            world = world or open_world_of(config)
            if config.train.steps is None and config.train.minutes is not None:
                log(f"measuring how many steps fit into {config.train.minutes:g} min ...")
            from pretrain.distributed import describe_machine
            from pretrain.train.resolve import resolve

            config = resolve(config, data, world, tasks)
            session = _Session(request, stream, folder, config, data, tasks, world)
            fingerprint = session.agreed_fingerprint()
            if is_main:
                data.tokenizer().save(folder / directory.TOKENIZER)
                text = to_yaml(config)
                directory.write_environment(folder, text, fingerprint, describe_machine())
                # Last, since a resume reads nothing else once it is there.
                replace_file(folder / directory.CONFIG, text.encode())
                (folder / REQUESTED).unlink()
            world.wait_for_main()
        except (ValueError, KeyboardInterrupt):  # not a full disk, after which it is resumed
            if is_main:  # remove its files, and the folders that were made for it
                for name in (REQUESTED, directory.LOCK):
                    (folder / name).unlink(missing_ok=True)
                with suppress(OSError):
                    for path in new_folders:
                        path.rmdir()
            raise
        return session.train(fingerprint)


# --- a run that continues ----------------------------------------------------------------------


def _continue(request: Request, folder: Path, stored: RunConfig, stream: TextIO) -> RunResult:
    """Continue a run in this process: from its newest checkpoint, or with more steps from the last
    one of a finished run. The order is that of `checks.RESUME_CHECKS`."""
    accepted, overrides, extension = request.accepted, request.overrides, None
    if request.kind != "resume":
        extension = checks.requested_extension(request.kind, stored, overrides)
        if checks.is_under_way(folder, stored, extension):
            extension = None
        else:
            overrides = extension.other_overrides
    requested = checks.requested_config(stored, request.target, overrides)
    checks.check_axes(requested)
    if is_unresolved(folder):
        world, stream = join_processes(requested, stream)
        log_to(stream)(
            f"{folder} was stopped before its settings were resolved; it starts from scratch"
        )
        return _train_from_scratch(request, folder, requested, stream, world)
    tasks = checks.check_packages_and_tasks(requested)
    if extension is not None:
        checks.check_extension(folder, requested, extension)
    elif checks.is_finished(folder, stored):
        checks.check_finished_run(stored, requested, accepted)
        return _report_finished(folder, requested, stream)

    joined, stream = join_processes(requested, stream)
    log = log_to(stream)
    if joined is not None and not joined.is_main:
        return _continue_on_other_rank(request, folder, tasks, stream, joined)
    with checks.only_writer(folder, log):
        environment = read_environment(folder)
        if extension is None:
            command = "resume"
            checkpoint = checks.newest_checkpoint(folder, environment["run"], log)
        else:
            command, checkpoint = extension.command, checks.last_checkpoint(folder)
        previous = checks.load_previous(
            folder, stored, checkpoint, started_with=environment["fingerprint"], command=command
        )
        config = requested = checks.with_schedule_history(requested, previous)
        if extension is not None:
            config = checks.extended_config(requested, extension, previous.step)
        checks.check_text_settings(previous, requested, accepted)
        data = open_text(requested, log)
        world = joined or open_world_of(requested)
        session = _Session(request, stream, folder, requested, data, tasks, world, checkpoint)
        changes = checks.check_changes(previous, requested, session.fingerprint(), data, accepted)
        if extension is not None:
            checks.check_seen_samples(data, requested, config)
        checks.check_fits_text(config, data)
        # The accepted device and threads.
        here = {"train.threads": world.threads, "train.device": world.device.type}
        session.config = _with_task_interval(with_settings(config, here), session)
        start_line = _describe_resume(folder, checkpoint)
        world.wait_for_main()
        name = "" if checkpoint is None else checkpoint.path.name
        world.broadcast_str(json.dumps({"config": to_dict(session.config), "checkpoint": name}))

        def write() -> None:
            checks.write_changes(previous, session.config, changes, command=command, log=log)
            checks.repair_tokenizer(folder, data, log)
            directory.archive_results(folder)
            log(start_line)

        return session.train(session.agreed_fingerprint(), write=write)


def _continue_on_other_rank(
    request: Request, folder: Path, tasks: list[EvalTask], stream: TextIO, world: World
) -> RunResult:
    """Continue on a rank other than 0, with the settings and the checkpoint of rank 0."""
    from pretrain.checkpoint.load import Checkpoint

    world.wait_for_main()
    main = json.loads(world.broadcast_str(""))
    config, name = compose([main["config"]]), main["checkpoint"]
    checkpoint = Checkpoint(folder / CHECKPOINTS / name) if name else None
    data = prepared_text(config)
    session = _Session(request, stream, folder, config, data, tasks, world, checkpoint)
    return session.train(session.agreed_fingerprint())


def _with_task_interval(config: RunConfig, session: _Session) -> RunConfig:
    """Return the config with an interval for in-loop tasks, if the run had no tasks before."""
    if not session.tasks or config.evaluate.every is not None:
        return config
    from pretrain.train.resolve import measure_pace, task_interval

    if session.world.size > 1:  # rank 0 cannot time a step of all ranks by itself
        raise ValueError(
            "evaluate.every must be given where several processes resume with their first in-loop "
            "tasks: the interval is measured only at the start of a run; add --evaluate.every N"
        )
    alone = replace(config, parallel=ParallelConfig())
    world = session.world.single_process()
    every = task_interval(config.train, measure_pace(alone, session.data, world, session.tasks))
    return replace(config, evaluate=replace(config.evaluate, every=every))


def _report_finished(folder: Path, config: RunConfig, stream: TextIO) -> RunResult:
    """Report that nothing is left to train, and write the report if the run died before it did."""
    world, stream = join_processes(config, stream)
    is_main = world is None or world.is_main
    if is_main:
        log_to(stream)(f"{folder} is finished: there is nothing left to train")
        report, summary = folder / directory.REPORT, folder / SUMMARY
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


# --- several processes -------------------------------------------------------------------------


def _launch(request: Request, folder: Path, n: int, stream: TextIO) -> RunResult:
    """Launch `n` processes with the same request, and again when one was killed: as a resume, if
    the run had started. ProcessFailed for other failures, and for more than MAX_RESTARTS in a row
    without a new checkpoint."""
    args = _command_line(request, folder)
    n_failures, saved = 0, set(folder.glob(f"{CHECKPOINTS}/step-*"))
    while True:
        try:
            exit_code = launch(args, n)
            break
        except ProcessFailed as error:
            before, saved = saved, set(folder.glob(f"{CHECKPOINTS}/step-*"))
            n_failures = n_failures + 1 if saved == before else 1
            if error.exit_code != 1 or n_failures > MAX_RESTARTS:
                raise
            log_to(stream)(f"{error}\nall processes were ended; restarting")
        has_started = request.kind == "new" and is_started(folder)
        if request.kind in ("extend", "anneal"):
            n_steps = checks.read_run_config(folder).train.steps
            has_started = n_steps == request.overrides["train"]["steps"]
        if has_started:  # never of a resume, whose --accept is still needed
            args = _command_line(Request(kind="resume", json=request.json), folder)
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
    # JSON is YAML in one line, except for infinity and NaN.
    not_json = {"Infinity": ".inf", "-Infinity": "-.inf", "NaN": ".nan"}
    for name, value in by_name(request.overrides).items():
        text = json.dumps(value, ensure_ascii=False)
        args.append(f"--{name}={not_json.get(text, text)}")
    for word in request.accepted:
        args += ["--accept", word]
    if request.json:
        args.append("--json")
    return args
