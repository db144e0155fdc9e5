"""Start, resume, extend or anneal a run: a request -> a running loop.

new              requested settings -> resolve -> config.yaml -> train
resume           load_previous -> check the differences -> record them -> train
extend, anneal   the same from the last checkpoint of a finished run, with more steps

`start` opens the run, new or continued, and trains it; `train` is the same for Python.
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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

from pretrain import __version__
from pretrain.config import Layer, RunConfig, compose, read_file, to_dict, to_yaml
from pretrain.data.format import PreparedData
from pretrain.evaluate.task_files import read_in_loop_tasks
from pretrain.fileio import NO_SPACE, replace_file
from pretrain.machine import RENDEZVOUS_FILE, n_processes, n_restarts, rank_of_process, this_command
from pretrain.parallel.config import ParallelConfig
from pretrain.report.page import write_report
from pretrain.run import directory, identity
from pretrain.run.directory import CHECKPOINTS, REQUESTED, SUMMARY, read_environment, read_summary
from pretrain.run.log import RunLog
from pretrain.runner import checks, ensemble
from pretrain.runner.launch import (
    ProcessFailed,
    check_same_on_all_ranks,
    die_with_parent,
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
    layer_of,
    new_run_folder,
    newest_run,
    notes_of,
    read_target,
    teacher_checkpoint,
    with_absolute_paths,
    with_settings,
)
from pretrain.runner.text import LastingStream, log_to, open_text, prepared_text

if TYPE_CHECKING:
    from pretrain.checkpoint.load import Checkpoint
    from pretrain.distributed import World
    from pretrain.evaluate.task_files import EvalTask
    from pretrain.train.state import Run

# Restarts in a row without a new checkpoint; an error that repeats so often is not transient.
MAX_RESTARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a command, or a call of the library, requests."""

    kind: Literal["new", "resume", "extend", "anneal"] = "new"
    targets: Sequence[str] = ()
    """a recipe, a YAML file, or one or more texts; none for the default recipe"""
    overrides: Layer = field(default_factory=dict)
    """settings over those of the target, or over those of the run that continues"""
    folder: Path | None = None
    """run directory; None for a new one under runs/, or for the newest to resume"""
    accepted: tuple[str, ...] = ()
    """changes that a resume accepts, by the names that its error gives them"""
    json: bool = False
    """whether processes that are launched print the result as JSON"""
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    """where messages go"""
    network: str = ""
    """"network 2 of 3" or "part 2" of the run whose folder has this one's; empty for another run"""
    planned_stop: tuple[str, int] = ("", 0)
    """where the run is interrupted on purpose: `Run.planned_stop`"""
    start_time: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    folder: Path
    exit_code: int = 0
    """0 finished; 128 plus a signal's number: stopped by it, saved and resumable"""
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


def train(
    target: str | Path | Sequence[str | Path] | None = None,
    *,
    run: str | Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Train a model as `pretrain train` does, and return its folder and summary.

    Args:
        target: A text file or folder, or several, a recipe, or a YAML file. Default: the recipe
            `english`.
        run: The run directory; must be new or empty. Default: runs/<name>-<n>.
        steps: Number of updates.
        minutes: Wall-clock time instead; of `steps` and `minutes`, `steps` decides.
        settings: Further settings by their full names, such as {"model.d_model": 64}.
        resume: Continue `run`, or the newest run, which `target` must not be given for.
        quiet: Print nothing.

    Raises:
        ConfigError: It lists every setting that is wrong.
        ValueError: For text that cannot be read, or a run directory that is not empty.
    """
    named = {"train.steps": steps, "train.minutes": minutes}
    given = {name: value for name, value in named.items() if value is not None}
    targets = [target] if isinstance(target, str | Path) else target or ()
    with open(os.devnull, "w") as nowhere:
        return start(
            Request(
                kind="resume" if resume else "new",
                targets=[str(each) for each in targets],
                overrides=layer_of({**given, **(settings or {})}),
                folder=None if run is None else Path(run),
                stream=nowhere if quiet else sys.stdout,
            )
        )


def start(request: Request) -> RunResult:
    """Do what is requested, in this process or in several that it launches. ValueError for what the
    user can correct; ProcessFailed where a process fails."""
    request = replace(request, stream=cast(TextIO, LastingStream(request.stream)))
    result = _start_network(request)
    if result.summary is None or not result.is_main:
        return result
    folder, config = result.folder, compose([read_file(result.folder / directory.CONFIG)])
    if ensemble.is_missing(config, result.summary):
        train_one, log = partial(_train_member, request, folder), log_to(request.stream)
        if code := ensemble.train_rest(folder, config, train_one, log):
            return RunResult(folder, code)
        result = RunResult(folder, 0, read_summary(folder), write_report(folder))
    if result.report is not None and result.summary is not None:
        from pretrain.train.console import Console, show_summary

        show_summary(Console(request.stream), result.summary, folder=folder, report=result.report)
    return result


def _train_member(request: Request, run: Path, folder: Path, settings: Layer, name: str) -> int:
    """Train a further network, or with another part held out, in a folder of its own."""
    log_to(request.stream)(name)
    if is_started(folder):
        one = replace(request, kind="resume", targets=(), overrides={})
    else:
        one = replace(
            request, kind="new", targets=[f"{run / directory.CONFIG}"], overrides=settings
        )
    one = replace(one, folder=folder, network=name, accepted=(), start_time=time.perf_counter())
    return _start_network(one).exit_code


def _start_network(request: Request) -> RunResult:
    """Train the one network, or the first of several, that is requested."""
    open_run = _new_run if request.kind == "new" else _continued_run
    with ExitStack() as held:  # the lock of the folder, until the report is written
        run = open_run(request, held)
        if isinstance(run, RunResult):  # launched processes trained it, or nothing was left to do
            return run
        from pretrain.train import loop

        folder, world = run.folder, run.world
        if world.is_main and run.config.report.to:
            # Trackers read metrics.jsonl in a session of their own: Ctrl-C is for the training, and
            # the last lines must still be sent.
            args = [sys.executable, "-m", "pretrain.report.trackers", str(folder)]
            args += ["--to", *run.config.report.to, "--parent", str(os.getpid())]
            subprocess.Popen(args, stdin=subprocess.DEVNULL, start_new_session=True)
        exit_code = loop.train(run)
        world.leave()
        if not world.is_main:
            return RunResult(folder, exit_code, is_main=False)
        report = write_report(folder)
        if not (folder / SUMMARY).is_file():
            whole = folder.parent.parent if request.network else folder
            command = f"{this_command()} train --resume --run {shlex.quote(str(whole))}"
            run.console.line(f"stopped and saved; continue with: {command}")
            return RunResult(folder, exit_code)
        return RunResult(folder, summary=read_summary(folder), report=report)


def n_processes_of_run(stored: RunConfig, overrides: Layer) -> int:
    """Return the number of processes of a run that continues with the command's settings."""
    # Nothing else is read from them: whether the rest fits the model is checked later.
    n = overrides.get("parallel", {}).get("processes", stored.parallel.processes)
    return compose([{"parallel": {"processes": n}}]).parallel.processes


def _run_of(
    request: Request,
    folder: Path,
    config: RunConfig,
    data: PreparedData,
    tasks: list[EvalTask],
    world: World,
) -> Run:
    """Return the run in memory, not opened yet."""
    from pretrain.train.console import Console
    from pretrain.train.state import Run

    return Run(
        folder=folder,
        config=config,
        data=data,
        world=world,
        console=Console(request.stream, brief=bool(request.network)),
        tasks=tasks,
        first_weights=partial(initial_checkpoint, config),
        planned_stop=request.planned_stop,
        start_time=request.start_time,
    )


def _fingerprint(run: Run, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return what the numbers of a run depend on besides its config: text, tokenizer, code,
    versions, device and threads. A resume with another one would be another run."""
    import torch

    if checkpoint is not None:  # it no longer needs the weights that it started from
        started_from = checkpoint.state["fingerprint"].get("first weights")
    else:
        weights = run.first_weights()
        started_from = None if weights is None else weights.sha256
    teacher = teacher_checkpoint(run.config, run.data)
    return {
        **({} if started_from is None else {"first weights": started_from}),
        **({} if teacher is None else {"teacher": teacher.sha256}),
        "training text": run.data.split("train").sha256,
        "held-out text": run.data.split("val").sha256,
        "tokenizer": run.data.manifest.tokenizer_sha256,
        "pretrain": __version__,
        "code": identity.code_hash(),
        "torch": torch.__version__,
        "device": run.world.device.type,
        "threads": run.world.threads,
    }


def _agreed_fingerprint(run: Run, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Return the fingerprint with the settings. ValueError if it is not that of all ranks."""
    agreed = {**_fingerprint(run, checkpoint), "settings": checks.settings_of(run.config)}
    check_same_on_all_ranks(run.world, agreed)
    return agreed


def _open(
    run: Run, held: ExitStack, fingerprint: Mapping[str, Any], checkpoint: Checkpoint | None = None
) -> Run:
    """Build the model and load the checkpoint."""
    run.identity = {"run": read_environment(run.folder)["run"], "fingerprint": fingerprint}
    held.enter_context(naming_lost_ranks(run.world, run.config.parallel.timeout_seconds))
    run.open(checkpoint)
    return run


def _joined(config: RunConfig, request: Request) -> tuple[World | None, Request]:
    """Join the other processes of the run, if there are any: the world (None for a single process,
    which opens one later), and the request, whose messages only rank 0 prints."""
    if n_processes() == 1:
        return None, request
    if RENDEZVOUS_FILE not in os.environ and rank_of_process() == 0:
        log_to(request.stream)(f"WORLD_SIZE is {n_processes()}: waiting for the other processes")
    die_with_parent()
    world = open_world_of(config)
    if not world.is_main:
        nowhere = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
        request = replace(request, stream=nowhere)
    return world, request


# --- a new run ---------------------------------------------------------------------------------


def _new_run(request: Request, held: ExitStack) -> Run | RunResult:
    """Open a new run, or continue it where torchrun starts it again."""
    if request.accepted:
        raise ValueError("--accept must come with --resume: a new run has nothing that changed")
    name, layers = read_target(*request.targets)
    config = compose_target(request.targets, layers, request.overrides, rules=errors_of_machine)
    if config.parallel.processes > 1 and n_processes() == 1:
        folder = new_run_folder(name, request.folder)
        return _launch(request, folder, config.parallel.processes)
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
                stream=request.stream,
                start_time=request.start_time,
            )
            return _continued_run(again, held)

    world, request = _joined(config, request)
    is_main = world is None or world.is_main
    for note in () if request.network else notes_of(layers, request.overrides, config):
        log_to(request.stream)(f"note: {note}")
    folder = new_run_folder(name, request.folder) if is_main else Path()
    if world is not None:
        folder = Path(world.broadcast_str(str(folder)))
    return _from_scratch(request, folder, with_absolute_paths(config), world, held)


def _from_scratch(
    request: Request, folder: Path, config: RunConfig, world: World | None, held: ExitStack
) -> Run:
    """Fill every empty setting, and write config.yaml, from which a resume reads them. The folder
    has the requested settings from the start, so that a run that is killed before they are resolved
    can be resumed too."""
    log = (lambda line: None) if request.network else log_to(request.stream)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    is_main = world is None or world.is_main
    if is_main:
        held.enter_context(checks.only_writer(folder, log))
        replace_file(folder / REQUESTED, to_yaml(config).encode())
    try:
        tasks = read_in_loop_tasks(config.evaluate)
        data = open_text(config, log, world)
        checks.check_fits_text(config, data)  # before torch is imported
        teacher_checkpoint(config, data)
        world = world or open_world_of(config)
        if config.train.steps is None and config.train.minutes is not None:
            log(f"measuring how many steps fit into {config.train.minutes:g} min ...")
        from pretrain.distributed import describe_machine
        from pretrain.train.resolve import resolve

        config = resolve(config, data, world, tasks)
        run = _run_of(request, folder, config, data, tasks, world)
        fingerprint = _agreed_fingerprint(run)
        if is_main:
            data.tokenizer().save(folder / directory.TOKENIZER)
            text = to_yaml(config)
            directory.write_environment(folder, text, fingerprint, describe_machine())
            # Last, since a resume reads nothing else once it is there.
            replace_file(folder / directory.CONFIG, text.encode())
            (folder / REQUESTED).unlink()
        world.wait_for_main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        # A resume may be repeated, and after a full disk a new run is resumed.
        is_kept = request.kind == "resume" or getattr(error, "errno", None) in NO_SPACE
        files = {folder / REQUESTED, folder / directory.LOCK}
        with suppress(OSError):
            # Else remove its files, and the folders that were made for it, if there is no more.
            if is_main and not is_kept and files >= {*folder.iterdir()}:
                for path in files:
                    path.unlink(missing_ok=True)
                for path in new_folders:
                    path.rmdir()
        raise
    return _open(run, held, fingerprint)


# --- a run that continues ----------------------------------------------------------------------


def _folder_to_continue(request: Request) -> Path:
    folder = newest_run() if request.folder is None else request.folder
    if request.kind != "resume" and (folder / directory.CHECKPOINT_MANIFEST).is_file():
        raise ValueError(
            f"{folder} is a checkpoint; {request.kind} continues a full run, from its last step. "
            f"Start another run from an earlier state: pretrain train --train.init_from {folder}"
        )
    return folder


def _continued_run(request: Request, held: ExitStack) -> Run | RunResult:
    """Open a run that continues: from its newest checkpoint, or with more steps from the last one
    of a finished run. The order is that of `checks.RESUME_CHECKS`."""
    folder = _folder_to_continue(request)
    if request.kind == "resume" and is_unresolved(folder):
        stored = compose([read_file(folder / REQUESTED)])
    else:
        stored = checks.read_run_config(folder)
    if n_processes() == 1 and (n := n_processes_of_run(stored, request.overrides)) > 1:
        return _launch(request, folder, n)

    command, accepted, overrides = request.kind, request.accepted, request.overrides
    extension = None
    if command != "resume":
        extension, others = checks.split_overrides(command, stored, overrides)
        if checks.is_under_way(folder, stored, command, extension):
            command, extension = "resume", None
        else:
            overrides = others
    requested = checks.requested_config(stored, request.targets, overrides)
    checks.check_axes(requested)
    if is_unresolved(folder):
        world, request = _joined(requested, request)
        log_to(request.stream)(
            f"{folder} was stopped before its settings were resolved; it starts from scratch"
        )
        return _from_scratch(request, folder, requested, world, held)
    tasks = checks.check_packages_and_tasks(requested)
    if extension is not None:
        checks.check_extension(folder, requested, command, extension)
    elif checks.is_finished(folder, stored):
        checks.check_finished_run(stored, requested, accepted)
        return _report_finished(request, folder, requested)

    joined, request = _joined(requested, request)
    log = log_to(request.stream)
    if joined is not None and not joined.is_main:
        return _continued_on_other_rank(request, folder, tasks, joined, held)
    held.enter_context(checks.only_writer(folder, log))
    environment = read_environment(folder)
    if extension is None:
        checkpoint = checks.newest_checkpoint(folder, environment["run"], log)
    else:
        checkpoint = checks.last_checkpoint(folder)
    previous = checks.load_previous(
        folder, stored, checkpoint, started_with=environment["fingerprint"], command=command
    )
    config = requested = checks.with_schedule_history(requested, previous)
    if extension is not None:
        config = checks.extended_config(folder, requested, command, extension, previous.step)
    checks.check_text_settings(previous, requested, accepted)
    data = open_text(requested, log, run=folder)
    world = joined or open_world_of(requested)
    run = _run_of(request, folder, requested, data, tasks, world)
    changes = checks.check_changes(
        previous, requested, _fingerprint(run, checkpoint), data, accepted
    )
    if extension is not None:
        checks.check_seen_samples(data, requested, config)
    checks.check_fits_text(config, data)
    # The accepted device and threads.
    here = {"train.threads": world.threads, "train.device": world.device.type}
    run.config = _with_task_interval(with_settings(config, here), run)
    start_line = _describe_resume(folder, checkpoint)
    world.wait_for_main()
    name = "" if checkpoint is None else checkpoint.path.name
    world.broadcast_str(json.dumps({"config": to_dict(run.config), "checkpoint": name}))
    _open(run, held, _agreed_fingerprint(run, checkpoint), checkpoint)
    # All checks have passed.
    is_accepted = any(r["by"] == "accept" and r["step"] >= previous.step for r in previous.records)
    if changes or is_accepted:
        run.repeated_ids.clear()  # with what was accepted, other ids may be read
    checks.write_changes(previous, run.config, changes, command=command, log=log)
    checks.repair_tokenizer(folder, data, log)
    directory.archive_results(folder)
    log(start_line)
    return run


def _continued_on_other_rank(
    request: Request, folder: Path, tasks: list[EvalTask], world: World, held: ExitStack
) -> Run:
    """Open the run on a rank other than 0, with the settings and the checkpoint of rank 0."""
    from pretrain.checkpoint.load import Checkpoint

    world.wait_for_main()
    main = json.loads(world.broadcast_str(""))
    config, name = compose([main["config"]]), main["checkpoint"]
    checkpoint = Checkpoint(folder / CHECKPOINTS / name) if name else None
    data = prepared_text(config, run=folder)
    run = _run_of(request, folder, config, data, tasks, world)
    return _open(run, held, _agreed_fingerprint(run, checkpoint), checkpoint)


def _with_task_interval(config: RunConfig, run: Run) -> RunConfig:
    """Return the config with an interval for in-loop tasks, if the run had no tasks before."""
    if not run.tasks or config.evaluate.every is not None:
        return config
    from pretrain.train.resolve import fit_steps, measure_pace

    if run.world.size > 1:  # rank 0 cannot time a step of all ranks by itself
        raise ValueError(
            "evaluate.every must be given where several processes resume with their first in-loop "
            "tasks: the interval is measured only at the start of a run; add --evaluate.every N"
        )
    alone = replace(config, parallel=ParallelConfig())
    pace = measure_pace(alone, run.data, run.world.single_process(), run.tasks)
    return fit_steps(config, run.data, pace)


def _report_finished(request: Request, folder: Path, config: RunConfig) -> RunResult:
    """Report that nothing is left to train, and write the report if the run died before it did."""
    world, request = _joined(config, request)
    is_main = world is None or world.is_main
    if is_main:
        report, summary = folder / directory.REPORT, folder / SUMMARY
        if not ensemble.is_missing(config, read_summary(folder)):
            log_to(request.stream)(f"{folder} is finished: there is nothing left to train")
        if not report.is_file() or report.stat().st_mtime < summary.stat().st_mtime:
            write_report(folder)
    if world is not None:
        world.wait_for_main()
        world.leave()
    return RunResult(folder, summary=read_summary(folder), is_main=is_main)


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


def _launch(request: Request, folder: Path, n: int) -> RunResult:
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
            log_to(request.stream)(f"{error}\nall processes were ended; restarting")
        has_started = request.kind == "new" and is_started(folder)
        if request.kind in ("extend", "anneal"):
            n_steps = checks.read_run_config(folder).train.steps
            has_started = n_steps == request.overrides["train"]["steps"]
        if has_started:  # never of a resume, whose --accept is still needed
            args = _command_line(Request(kind="resume", json=request.json), folder)
    is_done = exit_code == 0 and (folder / SUMMARY).is_file()
    summary = read_summary(folder) if is_done else None
    return RunResult(folder, exit_code, summary, is_main=False)


def _command_line(request: Request, folder: Path) -> list[str]:
    """Return the arguments of `pretrain` for a request."""
    if request.kind in ("extend", "anneal"):
        args = [request.kind, str(folder)]
    else:
        args = ["train", "--run", str(folder), *request.targets]
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
