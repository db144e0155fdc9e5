"""A run as it was at the checkpoint that it continues from, and what changes there.

`load_previous` returns its settings, its fingerprint and the changes that were accepted since, all
by name; `checks` compares them with what is requested now, `extended_config` has the settings of
`extend` and `anneal`, and `write_changes` records the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import Layer, RunConfig, compose, to_dict, to_yaml
from pretrain.data.format import PreparedData
from pretrain.fileio import read_json, replace_file
from pretrain.optim.schedule import LRSchedule, anneal, compare_schedules, extend, schedule_table
from pretrain.run import identity
from pretrain.run.directory import CONFIG, SUMMARY, TOKENIZER
from pretrain.run.identity import record
from pretrain.runner.request import by_name, with_settings
from pretrain.runner.text import Log

if TYPE_CHECKING:
    from pretrain.checkpoint.load import Checkpoint

# Settings that are never compared: they change nothing of what is trained, or the fingerprint has
# their values under its own names.
_FREE = ("evaluate.", "parallel.timeout_seconds", "train.threads", "train.device")
# Nor are these, with a deterministic reduction: the order of its sums does not depend on them.
_FREE_IF_ELASTIC = ("parallel.processes", "parallel.data")
_TRAIN_SETTINGS = (
    "train.steps",
    "train.evaluate_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.patience",
)
EXTENSION_SETTINGS: Mapping[str, Sequence[str]] = {
    "extend": (
        *_TRAIN_SETTINGS,
        "schedule.name",
        "schedule.warmup_steps",
        "schedule.decay_fraction",
        "schedule.final_fraction",
        "optimizer.learning_rate",
    ),
    "anneal": (*_TRAIN_SETTINGS, "schedule.final_fraction"),
}
"""The settings that a command takes for added steps."""


# --- settings by name --------------------------------------------------------------------------


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return every setting that the numbers of a run depend on, by full name, as JSON values."""
    free = _FREE + _FREE_IF_ELASTIC if config.parallel.elastic else _FREE
    return {name: value for name, value in by_name(config).items() if not name.startswith(free)}


def lr_schedule_of(config: RunConfig) -> LRSchedule:
    """Return the learning rates of all steps of a resolved config."""
    assert config.train.steps is not None
    return LRSchedule(config.schedule, config.optimizer.learning_rate, config.train.steps)


def is_finished(folder: Path, config: RunConfig) -> bool:
    """Return whether nothing is left to train: there is a summary, and it is not older than an
    extension that was already written into the config."""
    if not (folder / SUMMARY).is_file():
        return False
    history, n_steps = config.schedule.history, config.train.steps
    assert n_steps is not None
    was_extended = history and read_json(folder / SUMMARY)["steps"] <= history[-1].until_step
    return not (was_extended and history[-1].until_step < n_steps)


# --- the run at its checkpoint -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Previous:
    """A run as it was at the checkpoint that it continues from (or at its start)."""

    folder: Path
    stored: RunConfig
    """config.yaml"""
    checkpoint: Checkpoint | None
    """None for the start of the run"""
    records: Sequence[Mapping[str, Any]]
    """changes.jsonl"""
    values: Mapping[str, Any]
    """settings and fingerprint, by name, with the changes accepted at this step"""

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def settings(self) -> dict[str, Any]:
        """The settings among the values; names of the fingerprint have no dot."""
        return {name: value for name, value in self.values.items() if "." in name}

    @property
    def config(self) -> RunConfig:
        return with_settings(self.stored, self.settings)


def load_previous(
    folder: Path,
    stored: RunConfig,
    checkpoint: Checkpoint | None,
    *,
    started_with: Mapping[str, Any],
    command: str,
) -> Previous:
    """Load the run at `checkpoint`, or at its start with the fingerprint `started_with`."""
    step = 0 if checkpoint is None else checkpoint.step
    records = identity.read_records(folder)
    if command != "resume":
        # A record of extend or anneal at this step is of a command that died before it wrote
        # config.yaml, so it had no effect.
        records = [each for each in records if each["by"] == "accept" or each["step"] != step]
    if checkpoint is None:
        values = dict(started_with)
    else:
        values = dict(checkpoint.state["fingerprint"])
        logs = checkpoint.state["records"]
        values |= {Path(name).stem: hash_ for name, (_, hash_) in logs.items()}
    settings = values.pop("settings", None) or settings_of(stored)
    # A setting that is newer than the run had the effect of its default there.
    defaults = settings_of(RunConfig(parallel=stored.parallel))
    values = identity.with_records({**defaults, **values, **settings}, records, step=step)
    return Previous(folder, stored, checkpoint, records, values)


def with_schedule_history(requested: RunConfig, previous: Previous) -> RunConfig:
    """Return the requested config, whose schedule holds from the checkpoint's step on: if it was
    changed, the steps before keep the learning rates that they had."""
    before = lr_schedule_of(previous.config)
    schedule = replace(requested.schedule, history=before.schedule.history)
    peak = requested.optimizer.learning_rate
    if (schedule, peak) != (before.schedule, before.learning_rate):
        schedule = replace(schedule, history=before.history_until(previous.step))
    return replace(requested, schedule=schedule)


# --- more steps for a finished run -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extension:
    """More steps for a finished run, under another schedule."""

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
    own: dict[str, dict[str, Any]] = {}
    others: dict[str, dict[str, Any]] = {}
    for section, keys in overrides.items():
        for key, value in keys.items():
            layer = own if f"{section}.{key}" in EXTENSION_SETTINGS[command] else others
            layer.setdefault(section, {})[key] = value
    valid = by_name(compose([own]))
    names = [f"{section}.{key}" for section, keys in own.items() for key in keys]
    # An empty value means nothing for the others; without patience a run does not stop early.
    settings = {n: valid[n] for n in names if valid[n] is not None or n == "train.patience"}
    if "train.steps" not in settings:
        raise ValueError(
            f"{command} needs --train.steps N, the new total (above {stored.train.steps})"
        )
    return Extension(command, settings, others)


def extended_config(config: RunConfig, extension: Extension, done: int) -> RunConfig:
    """Return the settings for all steps, the `done` and the added ones."""
    schedule = {
        name.partition(".")[2]: value
        for name, value in extension.settings.items()
        if not name.startswith("train.")
    }
    old = lr_schedule_of(config)
    if extension.command == "extend":
        new = extend(old, start_step=done, steps=extension.steps, overrides=schedule)
    else:
        new = anneal(old, start_step=done, steps=extension.steps, **schedule)
    optimizer = replace(config.optimizer, learning_rate=new.learning_rate)
    train = {name: v for name, v in extension.settings.items() if name.startswith("train.")}
    return replace(with_settings(config, train), schedule=new.schedule, optimizer=optimizer)


# --- what is written when a run continues ------------------------------------------------------


def write_changes(
    previous: Previous,
    config: RunConfig,
    accepted: Sequence[identity.Change],
    *,
    command: str,
    log: Log,
) -> None:
    """Log and record what changes at the checkpoint's step, then write config.yaml. A process that
    dies between the two leaves a run that can be resumed or extended again."""
    step, folder = previous.step, previous.folder
    for change in accepted:
        log(f"accepted from step {step:,} on: {change}")
    lines = [record(step, c.word, c.old, c.new, by="accept") for c in accepted]
    by = "accept" if command == "resume" else command
    accepted_names = {change.name for change in accepted}
    changes = identity.differences(previous.settings, settings_of(config))
    lines += [
        record(step, c.word, c.old, c.new, by=by) for c in changes if c.name not in accepted_names
    ]
    old_lr, new_lr = lr_schedule_of(previous.config), lr_schedule_of(config)
    if command != "resume":
        lines.append(record(step, command, old_lr.steps, new_lr.steps, by=by))
    if any(change.changes_lr for change in changes):
        # The record keeps the table that the user saw.
        rows = compare_schedules(old_lr, new_lr, start_step=step)
        lines[-1]["curve"] = rows
        log(f"learning rates, old and new; the new ones are used from step {step:,} on:")
        log(schedule_table(rows))
    if lines:
        identity.write_records(folder, [*previous.records, *lines])

    for each in previous.records:
        # Learning rates keep the step at which they changed; the rest holds from the checkpoint on.
        is_later = each["step"] > step and each["by"] == "accept"
        if is_later and not identity.changes_lr(each["what"]):
            log(
                f"note: {each['what']} was changed at step {each['step']:,} and is now used from "
                f"step {step:,} on, since the checkpoint is older"
            )
    if to_dict(config) != to_dict(previous.stored):
        replace_file(folder / CONFIG, to_yaml(config).encode())


def repair_tokenizer(folder: Path, data: PreparedData, log: Log) -> None:
    """Write the tokenizer of the run's text into its tokenizer folder again, where another text was
    accepted, or the folder is damaged."""
    from pretrain.tokenizer.load import load_tokenizer

    try:
        if load_tokenizer(folder / TOKENIZER).sha256 == data.manifest.tokenizer_sha256:
            return
    except (ValueError, OSError):
        pass
    log(f"{folder / TOKENIZER} was not the tokenizer of the text; it is written again")
    data.tokenizer().save(folder / TOKENIZER)
