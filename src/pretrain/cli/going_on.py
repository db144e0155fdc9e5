"""A run that goes on, with whatever of it the disk has kept, or that starts anew where nothing was
decided yet.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.beginning import start
from pretrain.cli.environment import only_writer, read_environment
from pretrain.cli.machine import with_whole_paths
from pretrain.cli.output import Output
from pretrain.cli.processes import join
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
from pretrain.cli.training import fingerprint_of, train_run
from pretrain.config import Layer, RunConfig, compose, read_file, to_dict
from pretrain.data.format import PreparedData
from pretrain.distributed import leave_world, n_processes
from pretrain.evaluate.task_files import read_in_loop_tasks
from pretrain.parallel.config import ParallelConfig
from pretrain.report import require_packages, write_report
from pretrain.run.identity import check_accepted, differences
from pretrain.run.log import RunLog
from pretrain.runner.launch import check_same_on_all_ranks, open_world_of
from pretrain.runner.request import compose_target, initial_checkpoint, read_target, requested_file
from pretrain.runner.text import open_text, prepared_text
from pretrain.train.resolve import check_batch
from pretrain.train.signals import NO_PLANNED_STOP, PlannedStop

if TYPE_CHECKING:
    from pretrain.checkpoint import Checkpoint
    from pretrain.cli.continuing import Continuation
    from pretrain.distributed import World
    from pretrain.evaluate.task_files import EvalTask


def resume(
    folder: Path,
    target: str | None,
    overrides: Layer,
    output: Output,
    began: float,
    *,
    accepted: tuple[str, ...] = (),
    continuation: Continuation | None = None,
    ends: PlannedStop = NO_PLANNED_STOP,
) -> int:
    """Go on with a run; with a `continuation`, with a finished one, to more steps."""
    if (path := requested_file(folder)) is not None:
        asked = _wanted(compose([read_file(path)]), target, overrides)
        world, output = join(asked, output)
        output.say(f"{folder} was stopped before anything was decided: it starts anew")
        return start(asked, folder, output, began, world)
    stored = read_run(folder)
    wanted = _wanted(stored, target, overrides)
    require_packages(wanted.report.to)
    eval_tasks = read_in_loop_tasks(wanted.evaluate)
    if continuation is not None:
        continuation.check(folder, wanted)
    elif is_finished(folder, stored):
        changes = differences(settings_of(stored), settings_of(wanted))
        check_accepted(changes, {c.word for c in changes}.intersection(accepted))
        return _say_finished(folder, wanted, output)
    joined, output = join(wanted, output)
    if joined is not None and not joined.is_main:
        return _follow_leader(folder, joined, output, began, ends)
    with only_writer(folder, output):
        checkpoint = continuation.checkpoint(folder) if continuation else _newest(folder, output)
        by = "accept" if continuation is None else continuation.verb
        found = Resumption(folder, stored, wanted, checkpoint, accepted=accepted, by=by)
        found.refuse_other_text()
        data = open_text(found.wanted, output.say)
        world = joined or open_world_of(found.wanted)
        final = _settled(found, continuation, data, eval_tasks, output, world)
        put_tokenizer(folder, data, output)
        set_aside(folder)
        output.say(_where_it_goes_on(folder, checkpoint))
        world.wait_for_main()
        world.broadcast_str("" if checkpoint is None else checkpoint.path.name)
        check_same_on_all_ranks(world, fingerprint_of(final, data, world))
        return train_run(
            final,
            folder,
            data,
            world,
            output,
            began,
            eval_tasks=eval_tasks,
            resume_from=checkpoint,
            ends=ends,
        )


def _say_finished(folder: Path, config: RunConfig, output: Output) -> int:
    joined, output = join(config, output)
    if joined is None or joined.is_main:
        output.say(f"{folder} is finished: there is nothing left to train")
        if report_is_due(folder):  # it died in between
            write_report(folder)
        output.result({"run": str(folder), **summary_of(folder)})
    if joined is not None:
        joined.wait_for_main()
        leave_world(joined)
    return 0


def _follow_leader(
    folder: Path, world: World, output: Output, began: float, ends: PlannedStop
) -> int:
    """Go on with a run as the first process has settled it."""
    from pretrain.checkpoint import open_checkpoint

    world.wait_for_main()
    name = world.broadcast_str("")
    config = read_run(folder)
    data = prepared_text(config)
    check_same_on_all_ranks(world, fingerprint_of(config, data, world))
    return train_run(
        config,
        folder,
        data,
        world,
        output,
        began,
        eval_tasks=read_in_loop_tasks(config.evaluate),
        resume_from=open_checkpoint(folder / "checkpoints" / name) if name else None,
        ends=ends,
    )


def _settled(
    found: Resumption,
    continuation: Continuation | None,
    data: PreparedData,
    eval_tasks: list[EvalTask],
    output: Output,
    world: World,
) -> RunConfig:
    """The settings under which the run goes on, with all that was accepted on the disk."""
    from pretrain.train.state import fingerprint

    changes = found.settle(fingerprint(data, world, initial_checkpoint(found.wanted)), data)
    final = found.wanted
    if continuation is not None:
        final = continuation.extended(final, found.step)
        continuation.refuse_other_order(data, found.wanted, final)
    check_batch(final.model, final.train, n_tokens=data.min_source_tokens)
    if eval_tasks and final.evaluate.every is None:  # the run follows nothing yet
        final = _with_interval(final, data, world, eval_tasks)
    found.write(final, changes, output)
    return final


def _with_interval(
    config: RunConfig, data: PreparedData, world: World, eval_tasks: list[EvalTask]
) -> RunConfig:
    from pretrain.train.resolve import measure_pace, task_interval

    if world.size > 1:  # a step of all of them cannot be timed by the first one
        raise ValueError(
            "tasks that several processes begin to follow need --evaluate.every N: how often they "
            "are asked is measured where a run begins"
        )
    alone = world.single_process()
    pace = measure_pace(replace(config, parallel=ParallelConfig()), data, alone, eval_tasks)
    every = task_interval(config.train, pace)
    return replace(config, evaluate=replace(config.evaluate, every=every))


def _where_it_goes_on(folder: Path, checkpoint: Checkpoint | None) -> str:
    made = max((record["step"] for record in RunLog(folder).metrics()), default=0)
    if checkpoint is None:
        text, lost = f"{folder} has no checkpoint yet: it starts anew, as it was decided", made
    else:
        text, lost = f"resuming {folder} after step {checkpoint.step:,}", made - checkpoint.step
    return text + (f"; {lost:,} steps were made after it, and are made again" * (lost > 0))


def _wanted(stored: RunConfig, target: str | None, overrides: Layer) -> RunConfig:
    """The run's settings, and over them what the command says."""
    layers = [*([] if target is None else read_target(target)[1]), overrides]
    # Axes go with the processes that there are, as many as were asked for or not, and the run's own
    # model; all else is read as the command says it.
    rest: list[Layer] = [
        {s: keys for s, keys in layer.items() if s != "parallel"} for layer in layers
    ]
    asked = with_whole_paths(compose_target(target, rest[:-1], rest[-1]))
    wanted = with_settings(stored, asked_settings(asked, rest))
    own, here = to_dict(stored), {"parallel": {"processes": n_processes()}}
    said = [{"parallel": layer["parallel"]} for layer in layers if "parallel" in layer]
    axes = compose([{name: own[name] for name in ("model", "parallel")}, *said, here]).parallel
    axes.resolve(n_processes())
    # Another number of processes is a change like others.
    return replace(wanted, parallel=axes)


def _newest(folder: Path, output: Output) -> Checkpoint | None:
    from pretrain.train.state import newest_of

    checkpoint, complaints = newest_of(folder, run=read_environment(folder)["run"])
    for complaint in complaints:
        output.say(complaint)
    if checkpoint is None and complaints:
        raise ValueError(f"no checkpoint of {folder} is whole; nothing can be resumed")
    return checkpoint
