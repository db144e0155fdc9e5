"""Tasks in the loop: what is followed is asked, and its rows go into the records.

Nothing of the run changes by it: the model is read without dropout, and no state is drawn from.
What has a row for this step is not asked again, so a signal between two tasks loses nothing.
"""

from __future__ import annotations

from typing import Any

from pretrain.evaluate import EvalTask, evaluate_in_loop
from pretrain.train.build import uncompiled
from pretrain.train.run import Run
from pretrain.train.signals import StopSignals

KIND = "task"
_IN_SUMMARY = ("metric", "value", "stderr", "examples", "chance", "step")


@uncompiled
def ask_tasks(run: Run, stop: StopSignals) -> None:
    """Ask what has no row for this step yet, until a signal comes: the rest is then the first thing
    that a resume does."""
    tokenizer, new = run.data.tokenizer(), []
    run.model.unshard()
    for eval_tasks in missing_tasks(run):
        if stop.breaks_off(run.world):
            break
        row = evaluate_in_loop(
            run.lm_loss.decoder,
            tokenizer,
            eval_tasks,
            world=run.world,
            precision=run.settings.precision,
        )
        run.records.add_metrics({"kind": KIND, "step": run.done, **row})
        new.append(row)
    if new:
        run.screen.tasks(run.done, new)


def missing_tasks(run: Run) -> list[EvalTask]:
    """What is followed and has no row for this step yet."""
    rows = [r for r in run.records.metrics() if r["kind"] == KIND and r["step"] == run.done]
    asked = {row["task"] for row in rows}
    return [each for each in run.eval_tasks if each.task.name not in asked]


def last_rows(run: Run) -> dict[str, dict[str, Any]]:
    """By task, what it came to when it was last asked, for the summary."""
    rows = {row["task"]: row for row in run.records.metrics() if row["kind"] == KIND}
    names = [eval_tasks.task.name for eval_tasks in run.eval_tasks]
    return {name: {key: rows[name][key] for key in _IN_SUMMARY} for name in names if name in rows}
