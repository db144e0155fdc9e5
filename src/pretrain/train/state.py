"""A run in memory: what it works with, how far it is, and how it is saved and restored.

`Run.open` builds what its resolved config describes; `Run.save`, `Run.restore` and `roll_back` move
between memory and the checkpoints of its directory.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.format import TensorShard
from pretrain.checkpoint.load import Checkpoint, checkpoint_name, list_checkpoints
from pretrain.checkpoint.save import BackgroundSaver, delete_after, prune
from pretrain.config import RunConfig
from pretrain.data.format import PreparedData, StandingData
from pretrain.data.order import Order
from pretrain.distributed import World
from pretrain.evaluate.held_out import compare_splits
from pretrain.evaluate.task_files import EvalTask
from pretrain.fileio import check_free_space
from pretrain.optim.param_groups import (
    optimizer_state,
    restore_optimizer_state,
    swap_averages,
)
from pretrain.optim.schedule import LRSchedule
from pretrain.parallel.model import ParallelModel
from pretrain.run.directory import CHECKPOINTS, METRICS, POST_MORTEMS, CannotSave
from pretrain.run.log import BestEvaluation, RunLog
from pretrain.train.build import TrainingBatches, build_model, load_weights, training_batches
from pretrain.train.clock import Clock
from pretrain.train.config import filled
from pretrain.train.console import Console, show_plan
from pretrain.train.monitor import MOST_ROLLBACKS, SpikeDetector, StragglerDetector, rollbacks_of
from pretrain.train.resolve import checkpoint_bytes, max_steps

# A disk that fails once may have space again at the next checkpoint; after this many failures in a
# row it is full.
MOST_FAILED_SAVES = 3


class Saver(BackgroundSaver):
    """Writes checkpoints in the background, and reports and counts failures: in a row, on all
    processes alike."""

    def __init__(self, folder: Path, world: World, console: Console) -> None:
        super().__init__(folder, world)
        self.console = console
        self.failures = 0

    def wait(self, *, is_needed: bool = False) -> bool:
        """Wait for the running save. CannotSave if it fails and `is_needed`, or is the last of
        MOST_FAILED_SAVES failures."""
        try:
            has_ended = super().wait()
        except OSError as error:
            self.failures += 1
            message = f"a checkpoint could not be saved: {error}"
            if is_needed or self.failures >= MOST_FAILED_SAVES:
                raise CannotSave(f"{message}; free disk space, then: --resume") from error
            self.console.line(
                f"{message}; training continues, and stops after {MOST_FAILED_SAVES} such failures",
                style="bold red",
            )
            return True
        if has_ended:
            self.failures = 0
        return has_ended


@dataclass(slots=True, kw_only=True)
class Run:
    """A run in memory. Its model, optimizer, batches, log and saver exist after `open`."""

    folder: Path
    config: RunConfig
    """every field that training reads has a value (`resolve`)"""
    data: PreparedData
    world: World
    console: Console
    identity: Mapping[str, Any] = field(default_factory=dict)
    """name and fingerprint of the run, written into each checkpoint"""
    tasks: Sequence[EvalTask] = ()
    """tasks that are evaluated every config.evaluate.every steps, and after the last one"""
    first_weights: Callable[[], Checkpoint | None] = lambda: None
    """opens the checkpoint of another run that this one started from"""
    planned_stop: tuple[str, int] = ("", 0)
    """("stop", step): save and stop after the step, as after a signal; ("kill", step): send SIGKILL
    to this process before the step is evaluated or saved; for `pretrain verify`"""
    start_time: float = 0.0
    """on time.perf_counter, shifted back by the seconds of earlier, resumed processes"""

    model: ParallelModel = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    batches: TrainingBatches = field(init=False)
    log: RunLog = field(init=False)
    saver: Saver = field(init=False)
    schedule: LRSchedule = field(init=False)
    """the planned one with what the clock has decided"""
    clock: Clock | None = None
    """of a run that ends with its minutes"""
    held_out: Mapping[str, Any] = field(default_factory=dict)
    """of rank 0: `compare_splits`"""
    step: int = 0
    """updates made so far"""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """by what they were spent on: training, evaluation, checkpoints (waiting), count tables"""
    repeated_ids: dict[int, int] = field(default_factory=dict)
    """checksums of the ids that steps have read before a resume, and must read again"""
    best: BestEvaluation = field(default_factory=BestEvaluation)
    spike_detector: SpikeDetector = field(default_factory=lambda: SpikeDetector(math.inf))
    stragglers: StragglerDetector = field(default_factory=StragglerDetector)

    def open(self, checkpoint: Checkpoint | None) -> None:
        """Show the plan and build what the config describes: a new run, one from the weights of
        another, or one that continues from a checkpoint. OSError without space on the disk."""
        config, data, world = self.config, self.data, self.world
        self.log = RunLog(self.folder, writes=world.is_main)
        self.schedule = self.plan.decided(self.log.decisions())
        self.saver = Saver(self.checkpoints, world, self.console)
        self.batches = training_batches(config, data, world)
        show_plan(self.console, config, data, world, self.batches, self.tasks)
        if world.is_main and not self.console.is_brief:
            self.held_out = compare_splits(data.own if isinstance(data, StandingData) else data)
            for note in self.held_out["notes"]:
                self.console.line(f"note: {note}.", style="yellow")
        self.model, self.optimizer = build_model(config, data, world)
        if world.is_main:
            self.check_disk()
        if checkpoint is not None:
            self.restore(checkpoint)
            self.start_time -= checkpoint.state["total_seconds"]
            self.seconds["evaluation"] = checkpoint.state.get("evaluation_seconds", 0.0)
        else:
            self.load_first_weights()
        self.load_log(checkpoint)
        # Stages of a mixture begin at planned steps; extend and anneal add a number of steps.
        is_free = isinstance(self.batches.order, Order) and not config.schedule.origin_step
        if config.train.minutes is not None and config.schedule.name == "wsd" and is_free:
            used = 0.0 if checkpoint is None else checkpoint.state.get("clock_seconds", 0.0)
            most, decisions = max_steps(config, data), self.log.decisions()
            minutes = config.train.minutes / (config.train.members or 1)
            own = replace(config.train, minutes=minutes)
            self.clock = Clock(own, self.plan, most, decisions, used)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to those of `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def plan(self) -> LRSchedule:
        config = self.config
        peak = config.optimizer.learning_rate
        return LRSchedule(config.schedule, peak, filled(config.train.steps))

    @property
    def n_steps(self) -> int:
        return self.schedule.steps

    @property
    def tokens(self) -> int:
        """Targets of all steps so far."""
        return self.step * filled(self.config.train.batch_tokens)

    @property
    def epochs(self) -> float:
        return self.tokens / self.data.split("train").n_tokens

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        return self.schedule.at(step)

    def due(self, every: int | None) -> bool:
        """Whether something that happens every `every` steps (None: never) happens now; everything
        does after the last step."""
        return every is not None and (self.step % every == 0 or self.step == self.n_steps)

    @property
    def patience_exhausted(self) -> bool:
        """Whether the last train.patience evaluations were not better, so that the run stops."""
        patience = self.config.train.patience
        return patience is not None and self.best.n_evaluations_since >= patience

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model the averages of its weights in the block, if there are any."""
        self.model.reshard()
        swap_averages(self.optimizer)
        try:
            yield
        finally:
            self.model.reshard()
            swap_averages(self.optimizer)

    # --- checkpoints ------------------------------------------------------------------------------

    def check_disk(self) -> None:
        """OSError unless there is space for the checkpoints that a run needs."""
        n_bytes = checkpoint_bytes(self.config, self.data.manifest.vocab_size)
        # At least two checkpoints exist at a time; a resumed run has one of them already.
        n_new = 1 if list_checkpoints(self.checkpoints) else 2
        check_free_space(self.folder, n_bytes=n_new * n_bytes, n_files=20)

    def save(self, *, wait: bool = False) -> None:
        """Save this step, then delete all checkpoints but the newest, the best and the milestones.

        Training continues meanwhile, unless `wait`. CannotSave once the disk has failed several
        times, or has failed to keep what must be kept now.
        """
        train = self.config.train
        # Keep the best by held-out text, and the one that a rollback would return to.
        save_every = filled(train.save_every)
        protected_steps = (self.best.step or 0, self.step // save_every * save_every)
        protected = [self.checkpoints / checkpoint_name(step) for step in protected_steps]
        state = {
            "train_seconds": self.seconds["training"],
            "evaluation_seconds": self.seconds["evaluation"],
            "total_seconds": time.perf_counter() - self.start_time,
            **({} if self.clock is None else {"clock_seconds": self.clock.used}),
            "position": self.batches.position(self.step),
            "records": self.log.hashes() if self.world.is_main else {},
            **self.identity,
        }

        def delete_old() -> None:  # prune returns paths, which cannot be sent to other ranks
            keep, every = train.keep_checkpoints, train.keep_every
            prune(self.checkpoints, keep=keep, protect=protected, every=every)

        with self.timed("checkpoints"):
            self.saver.wait()  # for the previous save, whose failure is not this one's
            if (self.checkpoints / checkpoint_name(self.step)).exists():
                return
            with self.averaged():  # what reads a checkpoint's model gets the averages
                tensors, shards = self.snapshot()
                self.saver.save(
                    step=self.step,
                    tensors=tensors,
                    shards=shards,
                    state=state,
                    before=self.log.sync,
                    after=delete_old,
                )
            if wait:
                self.saver.wait(is_needed=True)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, TensorShard]]:
        """All tensors that the next step depends on and that this process saves, and the positions
        of those that are shards of a full tensor."""
        parameters = self.model.named_parameters()
        own = {f"model/{name}": p.detach() for name, p in parameters}
        state = optimizer_state(self.optimizer, parameters)
        own |= {f"optimizer/{name}": tensor for name, tensor in state.items()}
        tensors, shards = {}, {}
        for name, tensor in own.items():
            parameter = name.split("/")[1]
            shard = self.model.shard_of(parameter, tensor.ndim)
            if self.model.is_saved_here(parameter, is_full=shard is None):
                tensors[name] = tensor
                if shard is not None:
                    shards[name] = TensorShard(*shard)
        return tensors, shards

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Load weights, optimizer state and step of a checkpoint, or return to the start."""
        self.optimizer.state.clear()
        if checkpoint is None:
            self.model.initialize(self.config.train.seed)
            self.load_first_weights()
            self.step, self.seconds["training"] = 0, 0.0
            return
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
        restore_optimizer_state(self.optimizer, parameters, tensors)
        swap_averages(self.optimizer, keep=self.config.train.ema_decay > 0)
        self.step = checkpoint.step
        self.seconds["training"] = checkpoint.state["train_seconds"]

    def load_first_weights(self) -> None:
        """Load the weights of train.init_from, if it is set. ValueError if it has other ones than
        when the run started."""
        checkpoint = self.first_weights()
        if checkpoint is None:
            return
        if checkpoint.sha256 != self.identity["fingerprint"]["first weights"]:
            raise ValueError(
                f"{checkpoint.path} does not have the weights that this run started from; restore "
                "it to return to step 0"
            )
        load_weights(self.model, checkpoint)

    def load_log(self, checkpoint: Checkpoint | None) -> None:
        """Restore what is a function of the log up to the step of the weights, and truncate the log
        there. ValueError, with the files as they were, if its rollbacks do not lead to the next
        batch of the checkpoint."""
        if self.world.size > 1:
            self.log.copy_from_main(self.world.broadcast_str)
        records = [record for record in self.log.metrics() if record["step"] <= self.step]
        train = self.config.train
        self.best = BestEvaluation.from_log(records)
        threshold = math.inf if train.spike_action == "off" else train.spike_threshold
        self.spike_detector = SpikeDetector.from_log(records, threshold=threshold)
        self.batches.rollbacks = rollbacks_of(records)
        # A stored position other than the last one + 1 means that metrics.jsonl was edited. (A
        # rollback to this very checkpoint is later than it, and moves only the next batch.)
        next_position = self.batches.position(self.step - 1) + 1
        if checkpoint is not None and checkpoint.state["position"] != next_position:
            raise ValueError(
                f"{self.folder / METRICS} does not belong to the checkpoint of step {self.step:,}: "
                f"the next batch is number {checkpoint.state['position']:,} by the checkpoint, and "
                f"{next_position:,} by the rollbacks in the log. Restore the original "
                f"{METRICS}, or delete that checkpoint to resume from an older one"
            )
        self.log.truncate(self.step)
        if self.world.is_main:  # which knows whether a change of the text was accepted
            # What was read after a rollback is read again only if the run rolls back again.
            self.repeated_ids = {
                record["step"]: record["ids"]
                for removed in self.log.removed()
                for record in takewhile(lambda record: record["kind"] != "rollback", removed)
                if "ids" in record
            }


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
    checkpoint = Checkpoint(run.checkpoints / checkpoint_name(target)) if target else None
    run.restore(checkpoint)
    run.log.truncate(target)
    run.log.append_metrics({"kind": "rollback", "step": target, "batches": skipped})
    run.load_log(checkpoint)
    run.console.line(
        f"back to step {target:,}; {skipped:,} batches of data are skipped", style="yellow"
    )


def rollback_target(run: Run) -> int:
    """The last step whose checkpoint was due, verified; the newest one if that could not be saved;
    0 if none was due yet."""
    every = filled(run.config.train.save_every)
    due_step = run.step // every * every
    if due_step == 0:
        return 0
    answer = ""
    if run.world.is_main:
        names = [path.name for path in list_checkpoints(run.checkpoints)]
        steps = [int(name.removeprefix("step-")) for name in names]
        target = due_step if due_step in steps else max(steps, default=0)
        if not target:
            raise ValueError(
                f"{run.checkpoints} has no checkpoint to roll back to: that of step {due_step:,} "
                "could not be saved; free disk space, then start the run again"
            )
        Checkpoint(run.checkpoints / checkpoint_name(target)).verify()
        answer = str(target)
    return int(run.world.broadcast_str(answer))
