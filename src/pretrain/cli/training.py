"""What a run that begins and one that goes on have in common: its text, its world, and the training
itself, from a config in which everything is decided to a report.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.environment import read_environment
from pretrain.cli.output import Output
from pretrain.cli.resuming import settings_of, summary_of
from pretrain.config import RunConfig
from pretrain.data.format import PreparedData
from pretrain.report import write_report
from pretrain.runner.launch import naming_lost_ranks
from pretrain.runner.request import initial_checkpoint
from pretrain.train.signals import NO_PLANNED_STOP, PlannedStop

if TYPE_CHECKING:
    from pretrain.checkpoint import Checkpoint
    from pretrain.distributed import World
    from pretrain.evaluate.task_files import EvalTask


def fingerprint_of(config: RunConfig, data: PreparedData, world: World) -> dict[str, Any]:
    """All that the run's numbers hang on; its settings are among it, for a config.yaml that was
    edited since is another config."""
    from pretrain.train.state import fingerprint

    return {**fingerprint(data, world, initial_checkpoint(config)), "settings": settings_of(config)}


def train_run(
    config: RunConfig,
    folder: Path,
    data: PreparedData,
    world: World,
    output: Output,
    began: float,
    *,
    eval_tasks: list[EvalTask],
    resume_from: Checkpoint | None,
    ends: PlannedStop = NO_PLANNED_STOP,
) -> int:
    from pretrain.distributed import leave_world
    from pretrain.train.console import Console, show_plan, show_summary, show_tasks
    from pretrain.train.loop import train
    from pretrain.train.resolve import ends_early
    from pretrain.train.state import open_run

    console = Console(output.people)
    show_plan(console, config, data, world, ends_early=ends_early(config, data))
    show_tasks(console, config, eval_tasks)
    if world.is_main:
        _follow(config, folder)
    name = read_environment(folder)["run"]
    with naming_lost_ranks(world, config.parallel.timeout_seconds):
        run = open_run(
            folder,
            config,
            data,
            world,
            console,
            identity={"run": name, "fingerprint": fingerprint_of(config, data, world)},
            tasks=eval_tasks,
            first_weights=initial_checkpoint(config),
            resume_from=resume_from,
            start_time=began,
            planned_stop=ends,
        )
        code = train(run)
    leave_world(world)
    if not world.is_main:
        return code
    report = write_report(folder)
    if not (folder / "summary.json").is_file():
        go_on = f"pretrain train --resume --run {shlex.quote(str(folder))}"
        console.line(f"stopped and saved; go on with: {go_on}")
        output.result({"run": str(folder), "stopped": True, "exit_code": code})
        return code
    summary = summary_of(folder)
    show_summary(console, summary, folder=folder, report=report)
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
