"""A run in memory: what it works with, how far it is, and how it is saved and restored.

`open_run` builds it from a resolved config; `Run.save`, `Run.restore` and `roll_back` move between
memory and the checkpoints of its directory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import __version__
from pretrain.checkpoint.format import TensorShard
from pretrain.checkpoint.load import (
    Checkpoint,
    checkpoint_name,
    list_checkpoints,
    newest_good,
    open_checkpoint,
)
from pretrain.checkpoint.retention import delete_after, prune
from pretrain.checkpoint.save import BackgroundSaver
from pretrain.config import RunConfig
from pretrain.data.format import PreparedData
from pretrain.distributed import World
from pretrain.evaluate.task_files import EvalTask
from pretrain.fileio import check_free_space
from pretrain.model.loss import LMLoss
from pretrain.optim.param_groups import optimizer_state, restore_optimizer_state, role_of
from pretrain.optim.schedule import lr_at
from pretrain.parallel.model import ParallelModel
from pretrain.run import identity
from pretrain.run.directory import CHECKPOINTS, METRICS, POST_MORTEMS, CannotSave
from pretrain.run.log import BestEvaluation, RunLog
from pretrain.train.build import TrainingBatches, build_model, build_run_optimizer, training_batches
from pretrain.train.console import Console
from pretrain.train.monitor import MOST_ROLLBACKS, SpikeDetector, StragglerDetector, rollbacks_of
from pretrain.train.signals import NO_PLANNED_STOP, PlannedStop, kill_this_process

# A disk that fails once may have space again at the next checkpoint; after this many failures in a
# row it is full.
MOST_FAILED_SAVES = 3


@dataclass(slots=True)
class Saver:
    """Writes checkpoints in the background, and counts failures: in a row, on all processes
    alike."""

    background: BackgroundSaver
    console: Console
    failures: int = 0

    def save(self, *, wait: bool, **snapshot: Any) -> None:
        """Save a snapshot as `BackgroundSaver.save` does. CannotSave after MOST_FAILED_SAVES
        failures, or after one if it was to `wait`."""
        try:
            self.background.save(**snapshot)
        except OSError as error:
            self._count_failure(error, is_fatal=wait)
            return
        if wait:
            self.wait(is_needed=True)

    def wait(self, *, is_needed: bool = False) -> None:
        """Wait for the running save; CannotSave if it fails and `is_needed`, or once too often."""
        try:
            if self.background.wait():
                self.failures = 0
        except OSError as error:
            self._count_failure(error, is_fatal=is_needed)

    def poll(self) -> None:
        """Report a save that has failed, without waiting."""
        try:
            if self.background.poll():
                self.failures = 0
        except OSError as error:
            self._count_failure(error, is_fatal=False)

    def _count_failure(self, error: OSError, *, is_fatal: bool) -> None:
        self.failures += 1
        message = f"a checkpoint could not be saved: {error}"
        if is_fatal or self.failures >= MOST_FAILED_SAVES:
            raise CannotSave(f"{message}; free disk space, then: --resume") from error
        self.console.line(
            f"{message}; training continues, and stops after {MOST_FAILED_SAVES} such failures",
            style="bold red",
        )


@dataclass(slots=True)
class Run:
    """A run in memory."""

    folder: Path
    config: RunConfig
    """every field that training reads has a value (`resolve`)"""
    data: PreparedData
    world: World
    console: Console
    log: RunLog
    model: ParallelModel
    optimizer: torch.optim.Optimizer
    batches: TrainingBatches
    saver: Saver
    identity: Mapping[str, Any]
    """name and fingerprint of the run, written into each checkpoint"""
    tasks: Sequence[EvalTask] = ()
    """tasks that are evaluated every config.evaluate.every steps, and after the last one"""
    first_weights: Checkpoint | None = None
    """the weights of another run that this one started from"""
    planned_stop: PlannedStop = NO_PLANNED_STOP
    start_time: float = 0.0
    """on time.perf_counter, shifted back by the seconds of earlier, resumed processes"""

    step: int = 0
    """updates made so far"""
    position: int | None = None
    """the next batch, counted from the start of the data, as stored in the restored checkpoint"""
    train_seconds: float = 0.0
    stalled_seconds: float = 0.0
    """time for which this process waited for checkpoints"""
    best: BestEvaluation = field(default_factory=BestEvaluation)
    spike_detector: SpikeDetector = field(default_factory=lambda: SpikeDetector(math.inf))
    stragglers: StragglerDetector = field(default_factory=StragglerDetector)

    @property
    def lm_loss(self) -> LMLoss:
        return self.model.lm_loss

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def n_steps(self) -> int:
        assert self.config.train.steps is not None
        return self.config.train.steps

    @property
    def tokens(self) -> int:
        """Targets of all steps so far."""
        return self.step * (self.config.train.batch_tokens or 0)

    @property
    def epochs(self) -> float:
        return self.tokens / self.data.split("train").n_tokens

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        return lr_at(
            step,
            config=self.config.schedule,
            learning_rate=self.config.optimizer.learning_rate,
            steps=self.n_steps,
        )

    def due(self, every: int | None) -> bool:
        """Whether something that happens every `every` steps happens now; everything does after the
        last step."""
        assert every is not None, "intervals are filled by `resolve`"
        return self.step % every == 0 or self.step == self.n_steps

    @property
    def is_milestone(self) -> bool:
        """Whether the checkpoint of this step is kept for good."""
        every = self.config.train.keep_every
        return every is not None and self.step % every == 0

    @property
    def patience_exhausted(self) -> bool:
        """Whether the last train.patience evaluations were not better, so that the run stops."""
        patience = self.config.train.patience
        return patience is not None and self.best.since >= patience

    def sum_over_readers(self) -> tuple[int, int]:
        """Bytes and checksum of the batch that was read last, over all processes; those that read
        the same rows count once. Reports processes that have become slow."""
        own = (self.batches.n_bytes, self.batches.checksum, self.model.forward_seconds)
        n_bytes, checksums, seconds = zip(*self.world.all_gather(own), strict=True)
        for message in self.stragglers.record(seconds):
            self.console.line(message, style="yellow")
        size = self.world.size
        _, n_readers = self.config.parallel.resolve(size).batch_shard(self.world.rank)
        return int(sum(n_bytes)) * n_readers // size, int(sum(checksums)) * n_readers // size

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self, *, wait: bool = False) -> None:
        """Save this step, then delete all checkpoints but the newest, the best and the milestones.

        Training continues meanwhile, unless `wait`. CannotSave once the disk has failed several
        times, or has failed to keep what must be kept now.
        """
        start = time.perf_counter()
        train = self.config.train
        # Keep the best by held-out text, and the one that a rollback would return to.
        save_every = train.save_every or 1
        protected_steps = (self.best.step or 0, self.step // save_every * save_every)
        protected = [self.checkpoints / checkpoint_name(step) for step in protected_steps]
        state = {
            "train_seconds": self.train_seconds,
            "total_seconds": time.perf_counter() - self.start_time,
            "position": self.batches.position(self.step),
            "records": self.log.hashes() if self.world.is_main else {},
            **self.identity,
        }

        def delete_old() -> None:
            keep, every = train.keep_checkpoints, train.keep_every
            prune(self.checkpoints, keep=keep, protect=protected, every=every)

        self.saver.wait()  # for the previous save, whose failure is not this one's
        if not (self.checkpoints / checkpoint_name(self.step)).exists():
            tensors = self.tensors()
            self.saver.save(
                wait=wait,
                step=self.step,
                tensors=tensors,
                shards=self.shards_of(tensors),
                state=state,
                before=self.log.sync,
                after=delete_old,
            )
        self.stalled_seconds += time.perf_counter() - start

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on and that this process saves."""
        parameters = self.model.named_parameters()
        tensors = {f"model/{name}": p.detach() for name, p in parameters}
        state = optimizer_state(self.optimizer, parameters)
        tensors |= {f"optimizer/{name}": tensor for name, tensor in state.items()}
        shards = self.shards_of(tensors)
        return {
            name: tensor
            for name, tensor in tensors.items()
            if self.model.is_saver(name.split("/")[1], is_full=name not in shards)
        }

    def shards_of(self, tensors: Mapping[str, Tensor]) -> dict[str, TensorShard]:
        """The position in the full tensor, of those tensors that are a shard of one."""
        shards = {}
        for name, tensor in tensors.items():
            shard = self.model.shard_of(name.split("/")[1], tensor.ndim)
            if shard is not None:
                shards[name] = TensorShard(*shard)
        return shards

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load weights, optimizer state and step of a checkpoint."""
        load_weights(self.model, checkpoint)
        parameters = self.model.named_parameters()
        own = {name for name, _ in parameters}
        tensors = {}
        for name in checkpoint.names("optimizer"):  # PARAMETER/STATE
            parameter = name.split("/")[0]
            if parameter in own:
                shape = checkpoint.shape(f"optimizer/{name}")
                shard = self.model.shard_of(parameter, len(shape))
                bounds = None if shard is None else shard[1]
                tensor = checkpoint.read(f"optimizer/{name}", bounds)
                tensors[name] = tensor.to(self.world.device)
        self.optimizer.state.clear()
        restore_optimizer_state(self.optimizer, parameters, tensors)
        self.step = checkpoint.step
        self.train_seconds = checkpoint.state["train_seconds"]
        self.position = checkpoint.state["position"]

    def start_over(self) -> None:
        """Restore the weights that the run started with."""
        self.model.initialize(self.config.train.seed)
        if self.first_weights is not None:
            load_weights(self.model, self.first_weights)
        self.optimizer.state.clear()
        self.step = 0
        self.position = None
        self.train_seconds = 0.0

    def load_log(self) -> None:
        """Truncate the log to the step of the weights, and restore what is a function of it."""
        self.log.truncate(self.step)
        if self.world.size > 1:
            self.log.copy_from_main(self.world.broadcast_str)
        records = self.log.metrics()
        train = self.config.train
        self.best = BestEvaluation.from_log(records)
        threshold = math.inf if train.spike_action == "off" else train.spike_threshold
        self.spike_detector = SpikeDetector.from_log(records, threshold=threshold)
        self.batches.rollbacks = rollbacks_of(records)
        # A stored position other than the last one + 1 means that metrics.jsonl was edited. (A
        # rollback to this very checkpoint is later than it, and moves only the next batch.)
        next_position = self.batches.position(self.step - 1) + 1
        if self.position is not None and self.position != next_position:
            raise ValueError(
                f"{self.folder / METRICS} does not belong to the checkpoint of step "
                f"{self.step:,}: the checkpoint continues with batch {self.position:,} of the "
                f"data, the rollbacks in the log lead to {next_position:,}"
            )

    def kill(self) -> None:
        """Send SIGKILL to this process, once the running save is complete."""
        self.saver.background.wait()
        kill_this_process()


def open_run(
    folder: Path,
    config: RunConfig,
    data: PreparedData,
    world: World,
    console: Console,
    *,
    identity: Mapping[str, Any],
    tasks: Sequence[EvalTask] = (),
    first_weights: Checkpoint | None = None,
    resume_from: Checkpoint | None = None,
    start_time: float | None = None,
    planned_stop: PlannedStop = NO_PLANNED_STOP,
) -> Run:
    """Build a run from a resolved config: new, from the weights of another run, or resumed.

    `identity` has the keys `run` and `fingerprint`; `start_time` is when the command started, on
    time.perf_counter. OSError where the disk has no space for its checkpoints.
    """
    model = build_model(config, data, world)
    if world.is_main:
        _check_disk(folder, model)
    run = Run(
        folder=folder,
        config=config,
        data=data,
        world=world,
        console=console,
        log=RunLog(folder, writes=world.is_main),
        model=model,
        optimizer=build_run_optimizer(config, model),
        batches=training_batches(config, data, world),
        saver=Saver(BackgroundSaver(folder / CHECKPOINTS, world), console),
        identity=identity,
        tasks=tasks,
        first_weights=first_weights,
        planned_stop=planned_stop,
        start_time=time.perf_counter() if start_time is None else start_time,
    )
    if resume_from is not None:
        run.restore(resume_from)
        run.start_time -= resume_from.state.get("total_seconds", run.train_seconds)
    elif first_weights is not None:
        load_weights(run.model, first_weights)
    run.load_log()
    return run


def _check_disk(folder: Path, model: ParallelModel) -> None:
    """OSError unless there is space for the checkpoints that a run needs."""
    # Weights, and two numbers of optimizer state for each that is not in a lookup table.
    n_bytes = sum(
        p.numel() * p.element_size() * (1 if role_of(name, p) == "lookup" else 3)
        for name, p in model.lm_loss.decoder.named_parameters()
    )
    # At least two checkpoints exist at a time; a resumed run has one of them already.
    n_new = 1 if list_checkpoints(folder / CHECKPOINTS) else 2
    check_free_space(folder, n_bytes=n_new * n_bytes, n_files=20)


def load_weights(model: ParallelModel, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model of the same shapes, of each the shard of this
    process."""
    model.reshard()
    with torch.no_grad():
        for name, shard in model.shards.items():
            shard.local.copy_(checkpoint.read(f"model/{name}", shard.bounds))


def fingerprint(
    data: PreparedData, world: World, first_weights: Checkpoint | None
) -> dict[str, Any]:
    """What the numbers of a run depend on besides its config: text, tokenizer, code, versions,
    device and threads. A resume with another one would be another run."""
    start = {} if first_weights is None else {"first weights": first_weights.sha256}
    return {
        **start,
        "training text": data.split("train").sha256,
        "held-out text": data.split("val").sha256,
        "tokenizer": data.manifest.tokenizer_sha256,
        "pretrain": __version__,
        "code": identity.code_hash(),
        "torch": torch.__version__,
        "device": world.device.type,
        "threads": world.threads,
    }


def newest_of(folder: Path, *, run: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint of a run, and what is wrong with newer ones; ValueError for one
    of another run."""
    checkpoint, errors = newest_good(folder / CHECKPOINTS)
    if checkpoint is not None and checkpoint.state.get("run") != run:
        raise ValueError(
            f"{checkpoint.path} is a checkpoint of another run; move it out of {folder}"
        )
    return checkpoint, errors


# --- rollback -------------------------------------------------------------------------------------


def roll_back(run: Run) -> None:
    """Return to the last checkpoint that was due, and skip the data since then.

    Nothing is deleted before the checkpoint to return to is verified.
    """
    run.saver.wait(is_needed=True)
    target = rollback_target(run)
    # All from the first batch that will not be read again to the anomalous one.
    skipped = run.batches.position(run.step) + 1 - run.batches.position(target)
    if sum(back.step == target for back in run.batches.rollbacks) >= MOST_ROLLBACKS:
        raise ValueError(
            f"the loss jumps again and again after step {target:,}; {MOST_ROLLBACKS} rollbacks did "
            f"not help. The files in {run.folder / POST_MORTEMS} list the documents of these "
            "steps; a lower optimizer.learning_rate may help"
        )
    if run.world.is_main:
        delete_after(run.checkpoints, target)
    run.world.wait_for_main()
    if target:
        run.restore(open_checkpoint(run.checkpoints / checkpoint_name(target)))
    else:
        run.start_over()
    run.log.truncate(target)
    run.log.append_metrics({"kind": "rollback", "step": target, "batches": skipped})
    run.load_log()
    run.console.line(
        f"back to step {target:,}; {skipped:,} batches of data are skipped", style="yellow"
    )


def rollback_target(run: Run) -> int:
    """The last step whose checkpoint was due, verified; the newest one if that could not be saved;
    0 if none was due yet."""
    every = run.config.train.save_every
    assert every is not None
    due_step = run.step // every * every
    if due_step == 0:
        return 0
    answer = ""
    if run.world.is_main:
        names = [path.name for path in list_checkpoints(run.checkpoints)]
        steps = [int(name.removeprefix("step-")) for name in names]
        target = due_step if due_step in steps else max(steps, default=0)
        if not target:
            raise ValueError(f"{run.folder} has no checkpoint to roll back to")
        open_checkpoint(run.checkpoints / checkpoint_name(target)).verify()
        answer = str(target)
    return int(run.world.broadcast_str(answer))
