"""A run as it was at the checkpoint that it continues from, read from its directory.

`load_previous` returns its settings, its fingerprint and the changes that were accepted since, all
by name; `checks` compares them with what is requested now, and `write_changes` records the result.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import RunConfig, compose, to_dict, to_yaml
from pretrain.data.format import PreparedData
from pretrain.fileio import replace_file
from pretrain.optim.schedule import LRSchedule, compare_schedules, schedule_table
from pretrain.run.directory import CONFIG, SUMMARY, TOKENIZER, read_json
from pretrain.run.identity import (
    Change,
    changes_lr,
    differences,
    read_records,
    record,
    with_records,
    write_records,
)
from pretrain.runner.text import Log

if TYPE_CHECKING:
    from pretrain.checkpoint.load import Checkpoint

# Settings that change nothing of what is trained, and so are never compared.
_FREE = ("evaluate.", "parallel.timeout_seconds")
# Nor are these, with a deterministic reduction: the order of its sums does not depend on them.
_FREE_IF_ELASTIC = ("parallel.processes", "parallel.data")
# The fingerprint has the values of these under its own names.
_IN_FINGERPRINT = ("train.threads", "train.device")


# --- settings by name --------------------------------------------------------------------------


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return every setting that the numbers of a run depend on, by full name, as JSON values."""
    free = _FREE + _FREE_IF_ELASTIC if config.parallel.elastic else _FREE
    settings = {}
    for section, values in to_dict(config).items():
        for key, value in values.items():
            name = f"{section}.{key}"
            if not name.startswith(free) and name not in _IN_FINGERPRINT:
                settings[name] = value
    return settings


def with_settings(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the config with some settings, by full name; names that it does not have are
    ignored."""
    merged = to_dict(config)
    for name, value in values.items():
        section, _, key = name.partition(".")
        if key in merged.get(section, ()):
            merged[section][key] = value
    return compose([merged])


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
    records = read_records(folder)
    if command != "resume":
        # A record of extend or anneal at this step is of a command that died before it wrote
        # config.yaml, so it had no effect.
        records = [each for each in records if each["by"] == "accept" or each["step"] != step]
    if checkpoint is None:
        values = dict(started_with)
    else:
        values = dict(checkpoint.state["fingerprint"])
        for name, (_, hash_) in checkpoint.state["records"].items():
            values[_log_name(name)] = hash_
    settings = values.pop("settings", None) or settings_of(stored)
    # A setting that is newer than the run had the effect of its default there.
    defaults = settings_of(RunConfig(parallel=stored.parallel))
    values = with_records({**defaults, **values, **settings}, records, step=step)
    return Previous(folder, stored, checkpoint, records, values)


def log_hashes(previous: Previous) -> dict[str, str]:
    """Return the hashes of the lines of metrics and samples that were there at the checkpoint."""
    if previous.checkpoint is None:
        return {}
    from pretrain.run.log import RunLog

    log, records = RunLog(previous.folder), previous.checkpoint.state["records"]
    return {_log_name(name): log.hash_of_start(name, size) for name, (size, _) in records.items()}


def _log_name(file_name: str) -> str:
    return file_name.partition(".")[0]


def with_schedule_history(requested: RunConfig, previous: Previous) -> RunConfig:
    """Return the requested config, whose schedule holds from the checkpoint's step on: if it was
    changed, the steps before keep the learning rates that they had."""
    before = previous.config
    is_same = replace(requested.schedule, history=before.schedule.history) == before.schedule
    if is_same and requested.optimizer.learning_rate == before.optimizer.learning_rate:
        history = before.schedule.history
    else:
        history = lr_schedule_of(before).history_until(previous.step)
    return replace(requested, schedule=replace(requested.schedule, history=history))


def write_changes(
    previous: Previous, config: RunConfig, accepted: Sequence[Change], *, command: str, log: Log
) -> None:
    """Log and record what changes at the checkpoint's step, then write config.yaml. A process that
    dies between the two leaves a run that can be resumed or extended again."""
    step, folder = previous.step, previous.folder
    for change in accepted:
        log(f"accepted from step {step:,} on: {change}")
    lines = [record(step, c.word, c.old, c.new, by="accept") for c in accepted]
    by = "accept" if command == "resume" else command
    accepted_names = {change.name for change in accepted}
    others = differences(previous.settings, settings_of(config))
    for change in others:
        if change.name not in accepted_names:
            lines.append(record(step, change.word, change.old, change.new, by=by))
    old_lr, new_lr = lr_schedule_of(previous.config), lr_schedule_of(config)
    if command != "resume":
        lines.append(record(step, command, old_lr.steps, new_lr.steps, by=by))
    if any(change.changes_lr for change in others):
        # The record keeps the table that the user saw.
        rows = compare_schedules(old_lr, new_lr, start_step=step)
        lines[-1]["curve"] = rows
        log(f"learning rates, old and new; the new ones are used from step {step:,} on:")
        log(schedule_table(rows))
    if lines:
        write_records(folder, [*previous.records, *lines])

    for each in previous.records:
        # Learning rates keep the step at which they changed; the rest holds from the checkpoint on.
        is_later = each["step"] > step and each["by"] == "accept"
        if is_later and not changes_lr(each["what"]):
            log(
                f"note: {each['what']} was changed at step {each['step']:,} and is now used from "
                f"step {step:,} on, since the checkpoint is older"
            )
    if to_dict(config) != to_dict(previous.stored):
        replace_file(folder / CONFIG, to_yaml(config).encode())


def repair_tokenizer(folder: Path, data: PreparedData, log: Log) -> None:
    """The run's tokenizer folder has the tokenizer of its text; it is rewritten where another text
    was accepted, or the folder is damaged."""
    from pretrain.tokenizer.load import load_tokenizer

    try:
        if load_tokenizer(folder / TOKENIZER).sha256 == data.manifest.tokenizer_sha256:
            return
    except (ValueError, OSError):
        pass
    log(f"{folder / TOKENIZER} was not the tokenizer of the text; it is written again")
    new = folder / f".{TOKENIZER}"
    shutil.rmtree(new, ignore_errors=True)
    file = data.tokenizer().save(new)
    (folder / TOKENIZER).mkdir(exist_ok=True)
    os.replace(file, folder / TOKENIZER / file.name)
    new.rmdir()
