"""A run that goes on: what it was, what it would be now, and what must be written down before.

The run's folder and the words of a command come in; settings come out under which it may go on,
with everything that was accepted on the disk. Refused are an imported model, and every change that
nobody has accepted. Written in this order, so that a death between leaves the old or the new:
changes.jsonl, config.yaml, then the summary of a run that is to go on is set aside.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.environment import read_environment
from pretrain.cli.output import Output
from pretrain.config import Layer, RunConfig, compose, read_file, to_dict, to_yaml
from pretrain.data.format import PreparedData
from pretrain.fileio import replace_file, sync_folder
from pretrain.optim.schedule import LRSchedule, compare_schedules, schedule_table
from pretrain.run.directory import SUMMARY, read_json
from pretrain.run.identity import (
    Change,
    changes_lr,
    check_accepted,
    differences,
    read_records,
    record,
    with_records,
    write_records,
)
from pretrain.run.log import RunLog

if TYPE_CHECKING:
    from pretrain.checkpoint import Checkpoint

# What changes nothing of what is trained, and so needs nobody's word.
_FREE = ("evaluate.", "parallel.timeout_seconds")
# Nor these, where gradients are summed in an order that does not hang on them.
_PROCESSES = ("parallel.processes", "parallel.data")
# The fingerprint has these under its own names.
_IN_FINGERPRINT = ("train.threads", "train.device")


def read_run(folder: Path) -> RunConfig:
    """The settings of a run that was trained here; ValueError for anything else."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run directory: it has no config.yaml")
    if not (folder / "environment.json").is_file():
        raise ValueError(
            f"{folder} was imported, not trained; train on from it with --train.init_from {folder}"
        )
    layer = read_file(folder / "config.yaml")
    try:
        return compose([layer])
    except ValueError as error:  # nobody typed it: the file is damaged, or of another version
        raise ValueError(f"{folder / 'config.yaml'}: {error}") from None


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Every setting that a run hangs on, by its full name, as JSON has it."""
    flat = {f"{s}.{k}": v for s, section in to_dict(config).items() for k, v in section.items()}
    free = (*_FREE, *(_PROCESSES if config.parallel.elastic else ()))
    hangs = {name: value for name, value in flat.items() if not name.startswith(free)}
    return {name: value for name, value in hangs.items() if name not in _IN_FINGERPRINT}


def with_settings(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """`config` with some settings by their full names."""
    merged = to_dict(config)
    for name, value in values.items():
        section, _, key = name.partition(".")
        if key in merged.get(section, ()):
            merged[section][key] = value
    return compose([merged])


def asked_settings(asked: RunConfig, layers: Sequence[Layer]) -> dict[str, Any]:
    """What a command says itself, by full name; an empty value asks for nothing."""
    plain = to_dict(asked)
    said = {f"{s}.{k}": plain[s][k] for layer in layers for s in layer for k in layer[s]}
    if asked.train.steps is not None:
        said.pop("train.minutes", None)  # a recipe's, beside steps: it decides nothing
    # Everywhere else empty means: decide it. It was decided.
    return {k: v for k, v in said.items() if v not in (None, "auto") or k == "train.patience"}


def summary_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / SUMMARY)


def is_finished(folder: Path, config: RunConfig) -> bool:
    """Whether nothing is left to train: there is a summary, and it is no older than an extension
    that was written into the config."""
    if not (folder / SUMMARY).is_file():
        return False
    history, steps = config.schedule.history, config.train.steps
    assert steps is not None
    return not (history and summary_of(folder)["steps"] <= history[-1].until_step < steps)


def report_is_due(folder: Path) -> bool:
    """Whether a finished run has no report, or only that of an earlier stop."""
    report = folder / "report.html"
    return not report.is_file() or report.stat().st_mtime < (folder / SUMMARY).stat().st_mtime


def curve_of(config: RunConfig) -> LRSchedule:
    assert config.train.steps is not None
    return LRSchedule(config.schedule, config.optimizer.learning_rate, config.train.steps)


def with_curve(config: RunConfig, curve: LRSchedule) -> RunConfig:
    return replace(
        config,
        schedule=curve.schedule,
        optimizer=replace(config.optimizer, learning_rate=curve.learning_rate),
        train=replace(config.train, steps=curve.steps),
    )


@dataclass(slots=True)
class Resumption:
    """A run before it goes on from a checkpoint, or from its start."""

    folder: Path
    stored: RunConfig
    """what config.yaml says"""
    wanted: RunConfig
    """with what the command says besides"""
    checkpoint: Checkpoint | None
    accepted: tuple[str, ...] = ()
    by: str = "accept"
    """the verb; extend and anneal continue a finished run"""
    records: list[dict[str, Any]] = field(init=False)
    old: dict[str, Any] = field(init=False)
    """what the run had at the checkpoint, by name, and what was accepted there"""

    def __post_init__(self) -> None:
        records = read_records(self.folder)
        if self.by != "accept":
            # Written by a verb that died before it wrote config.yaml: it never happened.
            records = [r for r in records if r["by"] == "accept" or r["step"] != self.step]
        self.records = records
        if self.checkpoint is None:
            begun_with = dict(read_environment(self.folder)["fingerprint"])
        else:
            state = self.checkpoint.state
            records_then = {_stem(name): digest for name, (_, digest) in state["records"].items()}
            begun_with = {**state["fingerprint"], **records_then}
        settings = begun_with.pop("settings", None) or settings_of(self.stored)
        self.old = with_records({**begun_with, **settings}, records, step=self.step)
        self._settle_schedule()

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def before(self) -> RunConfig:
        """The settings that the run had."""
        return with_settings(self.stored, {k: v for k, v in self.old.items() if "." in k})

    def _settle_schedule(self) -> None:
        """A changed schedule holds from this step on: the rates of the steps before stay."""
        before, now = self.before, self.wanted
        same = replace(now.schedule, history=before.schedule.history) == before.schedule
        if same and now.optimizer.learning_rate == before.optimizer.learning_rate:
            history = before.schedule.history
        else:
            history = curve_of(before).history_until(self.step)
        self.wanted = replace(now, schedule=replace(now.schedule, history=history))

    def refuse_other_text(self) -> None:
        """ValueError for other settings of the text: before hours go into its preparation."""
        changes = self._changes({**self.old, **settings_of(self.wanted)})
        if any(c.is_text and (c.impossible or c.word not in self.accepted) for c in changes):
            words = {change.word for change in changes}
            named = [word for word in self.accepted if word in words]
            check_accepted(changes, named)

    def settle(self, fingerprint: dict[str, Any], data: PreparedData) -> list[Change]:
        """All changes, accepted; ValueError with all of them if not."""
        now = {**fingerprint, **settings_of(self.wanted), **self._records_now()}
        changes = [self._checked(change, data) for change in self._changes(now)]
        check_accepted(changes, self.accepted, now=now, records=self.records)
        threads, device = fingerprint["threads"], fingerprint["device"]
        train = replace(self.wanted.train, threads=threads, device=device)
        self.wanted = replace(self.wanted, train=train)
        return changes

    def _records_now(self) -> dict[str, str]:
        """Of the records what a checkpoint counts on: the lines that were there when it was
        made."""
        records = RunLog(self.folder)
        then = {} if self.checkpoint is None else self.checkpoint.state["records"]
        return {_stem(name): records.hash_of_start(name, size) for name, (size, _) in then.items()}

    def _changes(self, now: dict[str, Any]) -> list[Change]:
        found = differences(self.old, now)
        bent = any(c.changes_lr and not c.impossible for c in found)
        # The past was written for the change beside it, and not by the user.
        return [c for c in found if not (bent and c.name == "schedule.history")]

    def _checked(self, change: Change, data: PreparedData) -> Change:
        from pretrain.tokenizer import load_tokenizer

        if change.name != "tokenizer":
            return change
        had, has = load_tokenizer(self.folder / "tokenizer").vocab_size, data.manifest.vocab_size
        reason = f"the model has a row for each of {had:,} tokens, and this one has {has:,}"
        return replace(change, impossible=reason) if had != has else change

    def write(self, final: RunConfig, changes: Sequence[Change], output: Output) -> None:
        """Say and record what is otherwise from here on; then the run's files hold it."""
        old_curve, new_curve = curve_of(self.before), curve_of(final)
        lines = [record(self.step, c.word, c.old, c.new, by="accept") for c in changes]
        for change in changes:
            output.say(f"accepted from step {self.step:,} on: {change}")
        others = differences(_settings(self.old), settings_of(final))
        named = {change.name for change in changes}
        lines += [
            record(self.step, c.word, c.old, c.new, by=self.by)
            for c in others
            if c.name not in named
        ]
        if self.by != "accept":
            steps = (old_curve.steps, new_curve.steps)
            lines.append(record(self.step, self.by, *steps, by=self.by))
        if any(change.changes_lr for change in others):
            # Whoever reads the record later sees what the user saw.
            rows = compare_schedules(old_curve, new_curve, done=self.step)
            lines[-1]["curve"] = rows
            output.say(
                f"learning rates, old and new; the new ones hold from step {self.step:,} on:"
            )
            output.say(schedule_table(rows))
        if lines:
            write_records(self.folder, [*self.records, *lines])
        self._note_later_ones(output)
        if to_dict(final) != to_dict(self.stored):
            replace_file(self.folder / "config.yaml", to_yaml(final).encode())

    def _note_later_ones(self, output: Output) -> None:
        """Where newer checkpoints were lost; the rates alone remember where they were changed."""
        for each in self.records:
            is_late = each["step"] > self.step and each["by"] == "accept"
            if is_late and not changes_lr(each["what"]):
                output.say(
                    f"note: {each['what']} was changed at step {each['step']:,} and now holds from "
                    f"step {self.step:,} on, for the checkpoint is older"
                )


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if "." in name}


def put_tokenizer(folder: Path, data: PreparedData, output: Output) -> None:
    """Let the run's tokenizer be that of its text: another one was accepted, or its own was
    damaged."""
    from pretrain.tokenizer import load_tokenizer

    try:
        if load_tokenizer(folder / "tokenizer").sha256 == data.manifest.tokenizer_sha256:
            return
    except (ValueError, OSError):
        pass
    output.say(f"{folder / 'tokenizer'} was not that of the text, and is written anew")
    shutil.rmtree(folder / ".tokenizer", ignore_errors=True)
    made = data.tokenizer().save(folder / ".tokenizer")
    (folder / "tokenizer").mkdir(exist_ok=True)
    os.replace(made, folder / "tokenizer" / made.name)
    made.parent.rmdir()


def set_aside(folder: Path) -> None:
    """Keep the end of a run that goes on as summary.json.1, .2, ...; the summary goes last, for
    it is what tells that there is something left to set aside."""
    if not (folder / SUMMARY).is_file():
        return
    for name in ("baselines.json", SUMMARY):
        path = folder / name
        numbers = range(1, 10**6)
        aside = next(p for n in numbers if not (p := folder / f"{name}.{n}").exists())
        if path.exists():
            path.rename(aside)
            sync_folder(folder)
