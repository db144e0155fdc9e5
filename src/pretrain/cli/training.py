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
from pretrain.train.signals import TO_THE_END, Ends

if TYPE_CHECKING:
    from pretrain.checkpoint import Checkpoint
    from pretrain.distributed import World
    from pretrain.evaluate.task_files import EvalTask


def fingerprint_of(config: RunConfig, data: PreparedData, world: World) -> dict[str, Any]:
    """All that the run's numbers hang on; its settings are among it, for a config.yaml that was
    edited since is another config."""
    from pretrain.train.fingerprint import fingerprint

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
    ends: Ends = TO_THE_END,
) -> int:
    from pretrain.distributed import leave_world
    from pretrain.train.loop import train
    from pretrain.train.overview import show_eval_tasks, show_plan, show_summary
    from pretrain.train.screen import Screen

    screen = Screen(output.people)
    show_plan(screen, data=data, model=config.model, settings=config.train, world=world)
    show_eval_tasks(screen, eval_tasks, every=config.evaluate.every, steps=config.train.steps)
    if world.is_main:
        _follow(config, folder)
    run = read_environment(folder)["run"]
    with naming_lost_ranks(world, config.parallel.timeout_seconds):
        code = train(
            folder,
            data=data,
            model=config.model,
            optimizer=config.optimizer,
            schedule=config.schedule,
            settings=config.train,
            parallel=config.parallel,
            world=world,
            screen=screen,
            identity={"run": run, "fingerprint": fingerprint_of(config, data, world)},
            began=began,
            first_weights=initial_checkpoint(config),
            resume_from=resume_from,
            eval_tasks=eval_tasks,
            eval_tasks_every=config.evaluate.every,
            ends=ends,
        )
    leave_world(world)
    if not world.is_main:
        return code
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
