"""`extend` and `anneal`: a finished run gets more steps in place, under another schedule.

Rejected are an unfinished run, a total of steps that it has reached already, a damaged last
checkpoint, and a mixture whose seen samples would be others in a longer run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import Layer, RunConfig, compose, to_dict
from pretrain.optim.schedule import anneal, extend
from pretrain.run.directory import CHECKPOINTS, SUMMARY, read_json
from pretrain.run.identity import read_records
from pretrain.run.log import BestEvaluation, RunLog
from pretrain.runner.previous import (
    is_finished,
    lr_schedule_of,
    settings_of,
    with_settings,
)

if TYPE_CHECKING:
    from pretrain.checkpoint.load import Checkpoint
    from pretrain.data.format import PreparedData

# Settings for the added steps that are not of the schedule.
_TRAIN_SETTINGS = (
    "train.steps",
    "train.evaluate_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.patience",
)
# Settings of the schedule that a command takes for the added steps.
SCHEDULE_SETTINGS = {
    "extend": (
        "schedule.name",
        "schedule.warmup_steps",
        "schedule.decay_fraction",
        "schedule.final_fraction",
        "optimizer.learning_rate",
    ),
    "anneal": ("schedule.final_fraction",),
}


@dataclass(frozen=True, slots=True)
class Extension:
    """More steps for a finished run."""

    command: str
    """extend or anneal"""
    settings: dict[str, Any]
    """for the added steps, by full name"""
    other_overrides: Layer
    """the command's other settings, which are changes of the run as in a resume"""

    @property
    def steps(self) -> int:
        """The new total."""
        return int(self.settings["train.steps"])


def requested_extension(command: str, stored: RunConfig, overrides: Layer) -> Extension:
    """Separate the settings for the added steps from the command's other ones. ValueError without
    train.steps."""
    takes = _TRAIN_SETTINGS + SCHEDULE_SETTINGS[command]
    layer: dict[str, dict[str, Any]] = {}
    for section, keys in overrides.items():
        layer[section] = {k: v for k, v in keys.items() if f"{section}.{k}" in takes}
    checked = to_dict(compose([layer]))
    settings = {}
    for section, keys in layer.items():
        for key in keys:
            name, value = f"{section}.{key}", checked[section][key]
            if value is not None or name == "train.patience":
                settings[name] = value
    if settings.get("train.steps") is None:
        raise ValueError(
            f"{command} needs --train.steps N, the new total (above {stored.train.steps})"
        )
    others: dict[str, dict[str, Any]] = {}
    for section, keys in overrides.items():
        others[section] = {k: v for k, v in keys.items() if f"{section}.{k}" not in settings}
    return Extension(command, settings, others)


def is_under_way(folder: Path, stored: RunConfig, extension: Extension) -> bool:
    """Return whether this very command was given before, and its steps are not finished: it may be
    repeated, and then resumes."""
    if is_finished(folder, stored):
        return False
    command = extension.command
    records = [each for each in read_records(folder) if each["what"] == each["by"] == command]
    if not records or not records[-1]["new"] == stored.train.steps == extension.steps:
        return False
    values = settings_of(stored)
    return all(values[name] == value for name, value in extension.settings.items())


def check_extension(folder: Path, config: RunConfig, extension: Extension) -> None:
    """The run is finished, and the extension adds steps that train.patience would not stop."""
    if not is_finished(folder, config):
        raise ValueError(
            f"{folder} is not finished; finish it first: pretrain train --resume --run {folder}"
        )
    done = read_json(folder / SUMMARY)["steps"]
    if extension.steps <= done:
        raise ValueError(
            f"train.steps must be more than the {done} steps of {folder} (got {extension.steps}); "
            "it is the new total"
        )
    patience = extended_config(config, extension, done).train.patience
    best = BestEvaluation.from_log(RunLog(folder).metrics())
    if patience is not None and best.since >= patience:
        raise ValueError(
            f"{folder} had no better evaluation in the last {best.since}, so train.patience "
            f"{patience} would stop it at once; give --train.patience {best.since + patience}, "
            "or --train.patience null"
        )


def extended_config(config: RunConfig, extension: Extension, done: int) -> RunConfig:
    """Return the settings for all steps, the `done` and the added ones."""
    train = {name: v for name, v in extension.settings.items() if name in _TRAIN_SETTINGS}
    schedule = {
        name.partition(".")[2]: value
        for name, value in extension.settings.items()
        if name not in _TRAIN_SETTINGS
    }
    old = lr_schedule_of(config)
    if extension.command == "extend":
        new = extend(old, start_step=done, steps=extension.steps, overrides=schedule)
    else:
        new = anneal(old, start_step=done, steps=extension.steps, **schedule)
    config = with_settings(config, train)
    return replace(
        config,
        schedule=new.schedule,
        optimizer=replace(config.optimizer, learning_rate=new.learning_rate),
        train=replace(config.train, steps=new.steps),
    )


def last_checkpoint(folder: Path) -> Checkpoint:
    """Open and verify the checkpoint after the last step; an older one would repeat steps."""
    from pretrain.checkpoint.format import DamagedCheckpoint
    from pretrain.checkpoint.load import checkpoint_name, open_checkpoint

    steps = read_json(folder / SUMMARY)["steps"]
    try:
        checkpoint = open_checkpoint(folder / CHECKPOINTS / checkpoint_name(steps))
        checkpoint.verify()
    except DamagedCheckpoint as error:
        raise ValueError(
            f"{folder} cannot continue, because the checkpoint of its last step is damaged: {error}"
        ) from None
    return checkpoint


def check_seen_samples(data: PreparedData, old: RunConfig, new: RunConfig) -> None:
    """The samples that a mixture has read are the same ones in the longer run."""
    from pretrain.data.order import MixtureOrder
    from pretrain.train.build import training_batches

    before, after = training_batches(old, data).order, training_batches(new, data).order
    if not isinstance(before, MixtureOrder) or not isinstance(after, MixtureOrder):
        return
    old_starts = [stage.first_sample for stage in before.stages]
    new_starts = [stage.first_sample for stage in after.stages]
    if old_starts != new_starts:
        raise ValueError(
            "the stages of data.source start at fractions of the run: at the samples "
            f"{_join(old_starts)} of {old.train.steps} steps and {_join(new_starts)} of "
            f"{new.train.steps}, so the samples that were seen would be others. Only a mixture of "
            "one stage can be extended; or start a new run from these weights, with "
            "--train.init_from"
        )


def _join(numbers: list[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)
