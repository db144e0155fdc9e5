"""What `extend` and `anneal` share: a finished run that goes on in place, to more steps, under a
schedule that is printed before the first of them.

Refused are an unfinished run, a number of steps that it has made already, a last checkpoint that is
damaged, and a mixture of sources whose seen samples would be others in a longer run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.resuming import (
    curve_of,
    is_finished,
    settings_of,
    summary_of,
    with_curve,
    with_settings,
)
from pretrain.config import Layer, RunConfig, compose, to_dict
from pretrain.optim.schedule import LRSchedule
from pretrain.run.identity import read_records
from pretrain.run.log import BestEvaluation, RunLog

if TYPE_CHECKING:
    from pretrain.checkpoint import Checkpoint
    from pretrain.data import PreparedData

# What is not of the schedule and may be said anew for the added steps.
_ALSO = (
    "train.steps",
    "train.evaluate_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.patience",
)


@dataclass(frozen=True, slots=True)
class Continuation:
    """More steps for a finished run."""

    verb: str
    bend: Callable[..., LRSchedule]
    """old curve, done, steps, given -> new curve"""
    given: dict[str, Any]
    """settings for the added steps, by full name"""

    @property
    def steps(self) -> int:
        return int(self.given["train.steps"])

    def check(self, folder: Path, config: RunConfig) -> None:
        """All that can be refused without a tensor."""
        if not is_finished(folder, config):
            raise ValueError(
                f"{folder} is not finished; let it end: pretrain train --resume --run {folder}"
            )
        done = summary_of(folder)["steps"]
        if self.steps <= done:
            raise ValueError(
                f"train.steps {self.steps} is not more than the {done} steps that {folder} has "
                "made; it is the new total"
            )
        final = self.extended(config, done)
        patience, best = final.train.patience, BestEvaluation.from_log(RunLog(folder).metrics())
        if patience is not None and best.since >= patience:
            raise ValueError(
                f"{folder} had no better evaluation in the last {best.since}, so train.patience "
                f"{patience} would stop it at once; give --train.patience {best.since + patience}, "
                "or --train.patience null"
            )

    def extended(self, config: RunConfig, done: int) -> RunConfig:
        """The settings for all steps, old and added."""
        curve = self.bend(curve_of(config), done=done, steps=self.steps, given=_bends(self.given))
        also = {name: value for name, value in self.given.items() if name in _ALSO}
        return with_curve(with_settings(config, also), curve)

    def checkpoint(self, folder: Path) -> Checkpoint:
        """The state after the last step, verified; no other will do."""
        from pretrain.checkpoint import DamagedCheckpoint, checkpoint_name, open_checkpoint

        path = folder / "checkpoints" / checkpoint_name(summary_of(folder)["steps"])
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.verify()
        except DamagedCheckpoint as error:
            raise ValueError(
                f"{folder} cannot go on, for the state after its last step is damaged: {error}"
            ) from None
        return checkpoint

    def refuse_other_order(self, data: PreparedData, old: RunConfig, new: RunConfig) -> None:
        """ValueError if samples that were seen would be others in the longer run."""
        from pretrain.data.order import MixtureOrder
        from pretrain.train.build import training_batches

        before, after = (training_batches(c, data).order for c in (old, new))
        if isinstance(before, MixtureOrder) and isinstance(after, MixtureOrder):
            firsts = [[stage.first_sample for stage in each.stages] for each in (before, after)]
            if firsts[0] != firsts[1]:
                raise ValueError(
                    f"the stages of data.source begin at shares of the run, at the samples "
                    f"{_listed(firsts[0])} of {old.train.steps} steps and {_listed(firsts[1])} of "
                    f"{new.train.steps}: the samples that were seen would be others. Only a "
                    "mixture of one stage can go on; or begin a new run from these weights, with "
                    "--train.init_from"
                )


def _listed(numbers: list[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def _bends(given: dict[str, Any]) -> dict[str, Any]:
    """What is given of the schedule and its peak, by the names of fields."""
    return {name.partition(".")[2]: v for name, v in given.items() if name not in _ALSO}


def given_settings(overrides: Layer, takes: tuple[str, ...]) -> dict[str, Any]:
    """The settings of the command that are for the added steps, checked."""
    # The others may go with what the run is, and not with what is usual.
    named = {
        s: {k: v for k, v in keys.items() if f"{s}.{k}" in (*_ALSO, *takes)}
        for s, keys in overrides.items()
    }
    asked = to_dict(compose([named]))
    mine = {f"{s}.{k}": asked[s][k] for s, keys in named.items() for k in keys}
    return {k: v for k, v in mine.items() if v is not None or k == "train.patience"}


def was_begun(folder: Path, stored: RunConfig, verb: str, given: dict[str, Any]) -> bool:
    """Whether this very command was given before and its run is under way: it may be repeated."""
    if is_finished(folder, stored):
        return False
    verbs = [each for each in read_records(folder) if each["what"] == each["by"] == verb]
    steps = given["train.steps"]
    return bool(verbs) and verbs[-1]["new"] == stored.train.steps == steps and _holds(stored, given)


def _holds(stored: RunConfig, given: dict[str, Any]) -> bool:
    values = settings_of(stored)
    return all(values[name] == value for name, value in given.items())
