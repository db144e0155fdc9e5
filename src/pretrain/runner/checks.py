"""A run that continues: what it was, what a resume checks, and what is recorded.

RESUME_CHECKS lists the checks before the first step. `start` calls these functions in this order;
each raises a ValueError that names what differs and what to do. The last checks are made by
`Run.open` in `train.state`, while it loads the checkpoint. No file of the run is changed before all
checks have passed, except that a damaged checkpoint is renamed.
docs/reference/resume-checks.md also has the errors that other functions find on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import Layer, RunConfig, compose, read_file, to_dict, to_yaml
from pretrain.data.format import PreparedData
from pretrain.evaluate.task_files import read_in_loop_tasks
from pretrain.fileio import file_lock, replace_file
from pretrain.machine import n_processes
from pretrain.optim.schedule import LRSchedule, anneal, compare_schedules, extend, schedule_table
from pretrain.report.config import require_packages
from pretrain.run import directory, identity
from pretrain.run.directory import CONFIG, SUMMARY, TOKENIZER, read_environment, read_summary
from pretrain.run.identity import Change, check_accepted, differences, record
from pretrain.run.log import BestEvaluation, RunLog
from pretrain.runner.launch import check_same_on_all_ranks
from pretrain.runner.request import (
    by_name,
    check_is_one_model,
    compose_target,
    layer_of,
    read_target,
    with_absolute_paths,
    with_settings,
)
from pretrain.runner.text import Log, open_text
from pretrain.train.resolve import check_members

if TYPE_CHECKING:
    from pretrain.checkpoint.load import Checkpoint
    from pretrain.evaluate.task_files import EvalTask

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
    return {
        name: value for name, value in by_name(to_dict(config)).items() if not name.startswith(free)
    }


def lr_schedule_of(folder: Path, config: RunConfig) -> LRSchedule:
    """Return the learning rates of all steps of a run with this resolved config."""
    assert config.train.steps is not None
    plan = LRSchedule(config.schedule, config.optimizer.learning_rate, config.train.steps)
    return plan.decided(RunLog(folder).decisions())


def is_finished(folder: Path, config: RunConfig) -> bool:
    """Return whether nothing is left to train: there is a summary, and it is not older than an
    extension that was already written into the config."""
    if not (folder / SUMMARY).is_file():
        return False
    history, n_steps = config.schedule.history, config.train.steps
    assert n_steps is not None
    was_extended = history and read_summary(folder)["steps"] <= history[-1].until_step
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
    before, peak = previous.config, requested.optimizer.learning_rate
    schedule = replace(requested.schedule, history=before.schedule.history)
    if (schedule, peak) != (before.schedule, before.optimizer.learning_rate):
        past = lr_schedule_of(previous.folder, before).history_until(previous.step)
        schedule = replace(schedule, history=past)
    return replace(requested, schedule=schedule)


# --- the checks of a resume, in order ----------------------------------------------------------


def read_run_config(folder: Path) -> RunConfig:
    """The folder is a run that was trained here (not imported), and its config.yaml is valid."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a run directory: it has no {CONFIG}")
    check_is_one_model(folder, "trained")
    if not (folder / directory.ENVIRONMENT).is_file():
        raise ValueError(
            f"{folder} was imported, not trained; train from its weights with "
            f"--train.init_from {folder}"
        )
    layer = read_file(folder / CONFIG)
    try:
        config = compose([layer])
    except ValueError as error:  # a damaged file, or one of another version
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    if config.train.steps is None:
        raise ValueError(f"{folder / CONFIG} is damaged: it must have train.steps; restore it")
    return config


def requested_config(stored: RunConfig, targets: Sequence[str], overrides: Layer) -> RunConfig:
    """The settings of the command are valid, and the weights of train.init_from fit them."""
    target = read_target(*targets)[1] if targets else []
    # Not the recipe that a text or a file starts from, if the target is not a recipe itself.
    layers = [*(target[1:] or target), overrides]
    own = to_dict(stored)
    # What is not given again stays, but the weights of train.init_from may be gone by now.
    below: Layer = {**own, "train": {**own["train"], "init_from": None}}
    # The axes of `parallel` depend on the processes started here and on the run's own model.
    run_layer, *other_layers = [
        {section: keys for section, keys in layer.items() if section != "parallel"}
        for layer in (below, *layers)
    ]
    *files, above = other_layers
    composed = with_absolute_paths(compose_target(targets, [run_layer, *files], above))
    values, explicit = by_name(to_dict(composed)), {}
    for layer in other_layers:
        for name in by_name(layer):
            # Elsewhere an empty value means "resolve it", and it was resolved at the start.
            if values[name] not in (None, "auto") or name == "train.patience":
                explicit[name] = values[name]
    if "train.steps" in explicit:
        explicit.pop("train.minutes", None)  # steps replace it
    parallel = compose(
        [
            {"model": own["model"], "parallel": own["parallel"]},
            *({"parallel": layer.get("parallel", {})} for layer in layers),
            {"parallel": {"processes": n_processes()}},
        ]
    ).parallel
    return replace(with_settings(stored, explicit), parallel=parallel)


def check_axes(config: RunConfig) -> None:
    """The axes of `parallel` multiply to the number of processes, of which a mean allows one."""
    config.parallel.resolve(n_processes())
    check_members(config.train, n_processes())


def check_packages_and_tasks(config: RunConfig) -> list[EvalTask]:
    """The packages of report.to are installed, and the in-loop tasks can be read."""
    require_packages(config.report.to)
    return read_in_loop_tasks(config.evaluate)


def check_finished_run(stored: RunConfig, requested: RunConfig, accepted: Sequence[str]) -> None:
    """A finished run keeps its settings: there is nothing left to train with other ones."""
    check_accepted(differences(settings_of(stored), settings_of(requested)), accepted)


@contextmanager
def only_writer(folder: Path, log: Log) -> Iterator[None]:
    """No other process trains in this folder (run.lock)."""
    with file_lock(folder / directory.LOCK, action="trained") as warning:
        if warning is not None:
            log(f"note: {warning}")
        yield


def newest_checkpoint(folder: Path, run: str, log: Log) -> Checkpoint | None:
    """The newest checkpoint is of this run and every byte is as it was saved; damaged ones are
    quarantined. None where none was saved yet."""
    from pretrain.checkpoint.load import newest_good

    checkpoint, problems = newest_good(folder / directory.CHECKPOINTS)
    if checkpoint is not None and checkpoint.state.get("run") != run:
        raise ValueError(
            f"{checkpoint.path} is a checkpoint of another run; move it out of {folder}"
        )
    for problem in problems:
        log(problem)
    if checkpoint is None and problems:
        raise ValueError(f"no checkpoint of {folder} is intact; nothing can be resumed")
    return checkpoint


def check_text_settings(previous: Previous, requested: RunConfig, accepted: Sequence[str]) -> None:
    """The settings of the text are the same, or accepted: before it is prepared for hours."""
    changes = _changes(previous, {**previous.values, **settings_of(requested)})
    if any(c.is_text and (c.impossible or c.word not in accepted) for c in changes):
        check_accepted(changes, accepted)


def check_changes(
    previous: Previous,
    requested: RunConfig,
    fingerprint: Mapping[str, Any],
    data: PreparedData,
    accepted: Sequence[str],
) -> list[Change]:
    """All that the numbers depend on (text, tokenizer, code, versions, device, threads, settings,
    and the log up to the checkpoint) is the same, or accepted by name. Returns the changes."""
    from pretrain.tokenizer.load import load_tokenizer

    now = {**fingerprint, **settings_of(requested)}
    if previous.checkpoint is not None:
        log = RunLog(previous.folder)
        for name, (size, _) in previous.checkpoint.state["records"].items():
            now[Path(name).stem] = log.hash_of_start(name, size)
    changes = _changes(previous, now)
    for i, change in enumerate(changes):
        if change.name == "tokenizer":
            old_size = load_tokenizer(previous.folder / directory.TOKENIZER).vocab_size
            new_size = data.manifest.vocab_size
            if old_size != new_size:
                reason = f"the model has a row for each of {old_size:,} tokens (got {new_size:,})"
                changes[i] = replace(change, impossible=reason)
    check_accepted(changes, accepted, now=now, records=previous.records)
    return changes


def _changes(previous: Previous, now: Mapping[str, Any]) -> list[Change]:
    """Return the differences; schedule.history is not one where it follows from another."""
    changes = differences(previous.values, now)
    if any(identity.changes_lr(each.name) and not each.impossible for each in changes):
        changes = [change for change in changes if change.name != "schedule.history"]
    return changes


def check_fits_text(config: RunConfig, data: PreparedData) -> None:
    """Context length and batch size fit the text."""
    from pretrain.train.resolve import check_batch

    n_train_tokens, n_tokens = data.split("train").n_tokens, data.min_source_tokens
    check_batch(config.model, config.train, n_tokens=n_tokens, n_train_tokens=n_train_tokens)


RESUME_CHECKS: tuple[Callable[..., Any], ...] = (
    read_run_config,
    requested_config,
    check_axes,
    check_packages_and_tasks,
    check_finished_run,
    only_writer,
    read_environment,
    newest_checkpoint,
    check_text_settings,
    open_text,
    check_changes,
    check_fits_text,
    check_same_on_all_ranks,
)
"""The checks of a resume in the order in which they are made; `Run.open` makes the last ones."""


# --- more steps for a finished run -------------------------------------------------------------


def split_overrides(
    command: str, stored: RunConfig, overrides: Layer
) -> tuple[dict[str, Any], Layer]:
    """Separate an extension, which is the settings for the added steps by full name, from the
    command's other overrides, which are changes as in a resume. ValueError without train.steps."""
    takes = EXTENSION_SETTINGS[command]
    values = by_name(overrides)
    own = {name: value for name, value in values.items() if name in takes}
    others = layer_of({name: value for name, value in values.items() if name not in takes})
    valid = by_name(to_dict(compose([layer_of(own)])))
    # An empty value means nothing for the others; without patience a run does not stop early.
    settings = {n: valid[n] for n in own if valid[n] is not None or n == "train.patience"}
    if "train.steps" not in settings:
        raise ValueError(
            f"{command} needs --train.steps N, the new total (above {stored.train.steps})"
        )
    return settings, others


def extended_config(
    folder: Path, config: RunConfig, command: str, extension: Mapping[str, Any], done: int
) -> RunConfig:
    """Return the settings for all steps, the `done` and the added ones."""
    schedule = {
        name.partition(".")[2]: value
        for name, value in extension.items()
        if not name.startswith("train.")
    }
    old = lr_schedule_of(folder, config)
    steps = extension["train.steps"]
    if command == "extend":
        new = extend(old, start_step=done, steps=steps, overrides=schedule)
    else:
        new = anneal(old, start_step=done, steps=steps, **schedule)
    optimizer = replace(config.optimizer, learning_rate=new.learning_rate)
    train = {name: v for name, v in extension.items() if name.startswith("train.")}
    return replace(with_settings(config, train), schedule=new.schedule, optimizer=optimizer)


def is_under_way(
    folder: Path, stored: RunConfig, command: str, extension: Mapping[str, Any]
) -> bool:
    """Return whether this very command was given before, and its steps are not finished: it may be
    repeated, and then resumes."""
    schedule, values = stored.schedule, settings_of(stored)
    return (
        not is_finished(folder, stored)
        and schedule.origin_step > 0  # the run was extended or annealed before
        and schedule.anneal == (command == "anneal")
        and all(values[name] == value for name, value in extension.items())
    )


def check_extension(
    folder: Path, config: RunConfig, command: str, extension: Mapping[str, Any]
) -> None:
    """The run is finished, and the extension adds steps that train.patience would not stop."""
    steps = extension["train.steps"]
    if not is_finished(folder, config):
        raise ValueError(
            f"{folder} must be a finished run, to {command} it; finish it first: pretrain train "
            f"--resume --run {folder}"
        )
    done = read_summary(folder)["steps"]
    if steps <= done:
        raise ValueError(
            f"train.steps must be more than the {done} steps of {folder} (got {steps}); it is the "
            "new total"
        )
    patience = extension.get("train.patience", config.train.patience)
    n_worse = BestEvaluation.from_log(RunLog(folder).metrics()).n_evaluations_since
    if patience is not None and n_worse >= patience:
        raise ValueError(
            f"train.patience must be more than {n_worse} (got {patience}): {folder} had no "
            f"better evaluation in the last {n_worse}, so it would stop at once; add "
            f"--train.patience {n_worse + patience}, or --train.patience null"
        )


def last_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint after the last step is as it was saved; an older one would repeat steps."""
    from pretrain.checkpoint.format import DamagedCheckpoint
    from pretrain.checkpoint.load import Checkpoint, checkpoint_name

    steps = read_summary(folder)["steps"]
    try:
        checkpoint = Checkpoint(folder / directory.CHECKPOINTS / checkpoint_name(steps))
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

    starts = []
    for config in (old, new):
        order = training_batches(config, data).order
        if not isinstance(order, MixtureOrder):
            return
        starts.append(", ".join(f"{stage.first_sample:,}" for stage in order.stages))
    if starts[0] != starts[1]:
        raise ValueError(
            "data.source must have one stage, to add steps to a run: its stages start at the "
            f"samples {starts[0]} of {old.train.steps} steps, but at {starts[1]} of "
            f"{new.train.steps} steps, so earlier steps would have read other samples. Start a new "
            "run from these weights: --train.init_from RUN"
        )


# --- what is written when a run continues ------------------------------------------------------


def write_changes(
    previous: Previous, config: RunConfig, accepted: Sequence[Change], *, command: str, log: Log
) -> None:
    """Log and record what changes at the checkpoint's step, then write config.yaml. A process that
    dies between the two leaves a run that can be resumed or extended again."""
    step, folder = previous.step, previous.folder
    for change in accepted:
        log(f"accepted from step {step:,} on: {change}")
    by = "accept" if command == "resume" else command
    accepted_names = {change.name for change in accepted}
    changes = differences(previous.settings, settings_of(config))
    others = [change for change in changes if change.name not in accepted_names]
    lines = [record(step, c.word, c.old, c.new, by="accept") for c in accepted]
    lines += [record(step, c.word, c.old, c.new, by=by) for c in others]
    old_lr, new_lr = (lr_schedule_of(folder, each) for each in (previous.config, config))
    if command != "resume":
        lines.append(record(step, command, old_lr.steps, new_lr.steps, by=by))
    if any(identity.changes_lr(change.name) for change in changes):
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
