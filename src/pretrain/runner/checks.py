"""What a resume checks before its first step, in order: RESUME_CHECKS is the list.

`start.resume` calls these functions in this order; each raises a ValueError that names what differs
and what to do. The last three checks are made by `Run.open` in `train.state`, while it loads the
checkpoint. No file of the run is changed before all checks have passed, except that a damaged
checkpoint is renamed. OTHER_ERRORS says what other functions find on the way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import Layer, RunConfig, compose, read_file, to_dict
from pretrain.data.format import PreparedData
from pretrain.evaluate.task_files import read_in_loop_tasks
from pretrain.fileio import file_lock, read_json
from pretrain.machine import n_processes
from pretrain.report.config import require_packages
from pretrain.run import directory
from pretrain.run.directory import CONFIG, SUMMARY, read_environment
from pretrain.run.identity import Change, check_accepted, differences
from pretrain.run.log import BestEvaluation, RunLog
from pretrain.runner.launch import check_same_on_all_ranks
from pretrain.runner.previous import Extension, Previous, is_finished, settings_of
from pretrain.runner.request import (
    by_name,
    compose_target,
    read_target,
    with_absolute_paths,
    with_settings,
)
from pretrain.runner.text import Log, open_text

if TYPE_CHECKING:
    from pretrain.checkpoint.load import Checkpoint
    from pretrain.evaluate.task_files import EvalTask


def read_run_config(folder: Path) -> RunConfig:
    """The folder is a run that was trained here (not imported), and its config.yaml is valid."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a run directory: it has no {CONFIG}")
    if not (folder / directory.ENVIRONMENT).is_file():
        raise ValueError(
            f"{folder} was imported, not trained; train from its weights with "
            f"--train.init_from {folder}"
        )
    layer = read_file(folder / CONFIG)
    try:
        return compose([layer])
    except ValueError as error:  # a damaged file, or one of another version
        raise ValueError(f"{folder / CONFIG}: {error}") from None


def requested_config(stored: RunConfig, target: str | None, overrides: Layer) -> RunConfig:
    """The settings of the command are valid, and the weights of train.init_from fit them."""
    layers = [*([] if target is None else read_target(target)[1]), overrides]
    # The axes of `parallel` depend on the processes started here and on the run's own model.
    other_layers: list[Layer] = [
        {section: keys for section, keys in layer.items() if section != "parallel"}
        for layer in layers
    ]
    *below, above = other_layers
    composed = with_absolute_paths(compose_target(target, below, above))
    values, explicit = by_name(composed), {}
    for layer in other_layers:
        for name in (f"{section}.{key}" for section in layer for key in layer[section]):
            # Elsewhere an empty value means "resolve it", and it was resolved at the start.
            if values[name] not in (None, "auto") or name == "train.patience":
                explicit[name] = values[name]
    if composed.train.steps is not None:
        explicit.pop("train.minutes", None)  # of a recipe; steps replace it

    own = to_dict(stored)
    parallel = compose(
        [
            {"model": own["model"], "parallel": own["parallel"]},
            *({"parallel": layer.get("parallel", {})} for layer in layers),
            {"parallel": {"processes": n_processes()}},
        ]
    ).parallel
    return replace(with_settings(stored, explicit), parallel=parallel)


def check_axes(config: RunConfig) -> None:
    """The axes of `parallel` multiply to the number of processes."""
    config.parallel.resolve(n_processes())


def check_packages_and_tasks(config: RunConfig) -> list[EvalTask]:
    """The packages of report.to are installed, and the in-loop tasks can be read."""
    require_packages(config.report.to)
    return read_in_loop_tasks(config.evaluate)


def check_finished_run(stored: RunConfig, requested: RunConfig, accepted: Sequence[str]) -> None:
    """A finished run keeps its settings: there is nothing left to train with other ones."""
    changes = differences(settings_of(stored), settings_of(requested))
    words = {change.word for change in changes}
    check_accepted(changes, words.intersection(accepted))


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
        words = {change.word for change in changes}
        check_accepted(changes, [word for word in accepted if word in words])


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
    if any(change.changes_lr and not change.impossible for change in changes):
        changes = [change for change in changes if change.name != "schedule.history"]
    return changes


def check_fits_text(config: RunConfig, data: PreparedData) -> None:
    """Context length and batch size fit the text."""
    from pretrain.train.resolve import check_batch

    check_batch(config.model, config.train, n_tokens=data.min_source_tokens)


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
"""The checks of a resume in the order in which they are made."""

CHECKS_WHILE_LOADING: Mapping[str, str] = {
    "check_disk": "The disk has space for the next checkpoints.",
    "restore": "Every byte of weights and optimizer state is as it was saved.",
    "load_log": "metrics.jsonl has the rollbacks that the position of the checkpoint counts with.",
}
"""Those that `Run.open` makes after them."""


OTHER_ERRORS = (
    "Other functions of a resume can find an error too: before requested_config, "
    "`n_processes_of_run` (the number of processes is not valid) and `launch` (there is no memory "
    "for this number); before only_writer, or after open_text in one process, `open_world` (the "
    "device is not available here); before check_text_settings, `load_previous` (changes.jsonl "
    "cannot be read); and before check_same_on_all_ranks, `_with_task_interval` (several processes "
    "resume with their first in-loop tasks, without evaluate.every)."
)


def describe_resume_checks() -> dict[str, str]:
    """Return all checks of a resume in order, name -> description, for the documentation."""
    described = {}
    for check in RESUME_CHECKS:
        first_paragraph = (inspect.getdoc(check) or "").partition("\n\n")[0]
        described[check.__name__] = " ".join(first_paragraph.split())
    return {**described, **CHECKS_WHILE_LOADING}


# --- extend and anneal -------------------------------------------------------------------------


def is_under_way(folder: Path, stored: RunConfig, extension: Extension) -> bool:
    """Return whether this very command was given before, and its steps are not finished: it may be
    repeated, and then resumes."""
    schedule, values = stored.schedule, settings_of(stored)
    return (
        not is_finished(folder, stored)
        and schedule.origin_step > 0  # the run was extended or annealed before
        and schedule.anneal == (extension.command == "anneal")
        and all(values[name] == value for name, value in extension.settings.items())
    )


def check_extension(folder: Path, config: RunConfig, extension: Extension) -> None:
    """The run is finished, and the extension adds steps that train.patience would not stop."""
    command, steps = extension.command, extension.steps
    if not is_finished(folder, config):
        raise ValueError(
            f"{folder} must be a finished run, to {command} it; finish it first: pretrain train "
            f"--resume --run {folder}"
        )
    done = read_json(folder / SUMMARY)["steps"]
    if steps <= done:
        raise ValueError(
            f"train.steps must be more than the {done} steps of {folder} (got {steps}); it is the "
            "new total"
        )
    patience = extension.settings.get("train.patience", config.train.patience)
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

    steps = read_json(folder / SUMMARY)["steps"]
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
