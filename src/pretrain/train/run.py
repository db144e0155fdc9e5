"""A run in memory: what it works on and with, how far it is, and how it is kept on the disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import (
    BackgroundSaver,
    Checkpoint,
    Place,
    checkpoint_name,
    list_checkpoints,
    newest_good,
    prune,
)
from pretrain.data import PreparedData
from pretrain.distributed import World
from pretrain.evaluate import EvalTask
from pretrain.fileio import check_free_space
from pretrain.model import LMLoss, ModelConfig
from pretrain.optim import OptimizerConfig
from pretrain.optim.param_groups import optimizer_state, restore_optimizer_state, role_of
from pretrain.parallel import ParallelConfig, ParallelModel
from pretrain.train.batches import TrainingBatches
from pretrain.train.build import build_model, build_updates, training_batches
from pretrain.train.config import TrainConfig
from pretrain.train.records import METRICS, Best, CannotSave, Records
from pretrain.train.screen import Screen
from pretrain.train.stragglers import Stragglers
from pretrain.train.watch import Finding, Watch, rollbacks_of

# A disk that fails once may have been cleared by the next checkpoint; one that fails so often is
# full.
MOST_FAILED_SAVES = 3


@dataclass(slots=True)
class Run:
    """A run in memory: what it works on, what it works with, and how far it is."""

    folder: Path
    data: PreparedData
    batches: TrainingBatches
    model: ParallelModel
    """the objective, and this process's share of it"""
    parallel: ParallelConfig
    optimizer: torch.optim.Optimizer
    settings: TrainConfig
    world: World
    screen: Screen
    records: Records
    saver: BackgroundSaver
    identity: Mapping[str, Any]
    """What each checkpoint says of the run: whose it is, and what its numbers hang on."""
    eval_tasks: Sequence[EvalTask] = ()
    """Tasks that are asked every `eval_tasks_every` steps, and after the last one."""
    eval_tasks_every: int | None = None
    best: Best = field(default_factory=Best)
    stragglers: Stragglers = field(default_factory=Stragglers)
    watch: Watch = field(default_factory=lambda: Watch(0.0))
    finding: Finding | None = None
    """What is wrong with the step at hand, if anything."""
    done: int = 0
    """updates made so far"""
    position: int | None = None
    """the batch, counted from the start of the data, that a checkpoint says comes next"""
    train_seconds: float = 0.0
    began: float = 0.0
    """when the command did, or would have had it done alone what processes before it did; on
    perf_counter"""
    stalled_seconds: float = 0.0
    """time for which training stood still, this time, because of checkpoints"""
    failed_saves: int = 0

    @property
    def steps(self) -> int:
        assert self.settings.steps is not None
        return self.settings.steps

    @property
    def lm_loss(self) -> LMLoss:
        return self.model.lm_loss

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, that is a tensor, and that this process is to
        save."""
        parameters = self.model.named_parameters()
        found = {f"model/{name}": p.detach() for name, p in parameters}
        state = optimizer_state(self.optimizer, parameters)
        found |= {f"optimizer/{name}": t for name, t in state.items()}
        places, saves = self.places(found), self.model.is_saver
        return {
            name: tensor
            for name, tensor in found.items()
            if saves(name.split("/")[1], is_full=name not in places)
        }

    def places(self, tensors: Mapping[str, Tensor]) -> dict[str, Place]:
        """Where in the whole ones lie those tensors of which this process holds a box."""
        found = {}
        for name, tensor in tensors.items():
            owner = name.split("/")[1]
            if (place := self.model.shard_of(owner, tensor.ndim)) is not None:
                found[name] = Place(*place)
        return found

    def read_by_all(self) -> tuple[int, int]:
        """Bytes and checksum of what the step has read; processes that read the same are one. Says
        it if one of them is slow."""
        own = (self.batches.n_bytes, self.batches.checksum, self.model.forward_seconds)
        n_bytes, checksums, seconds = zip(*self.world.all_gather(own), strict=True)
        for sentence in self.stragglers.note(seconds):
            self.screen.line(sentence, style="yellow")
        _, n = self.parallel.resolve(self.world.size).batch_shard(self.world.rank)
        size = self.world.size
        return int(sum(n_bytes)) * n // size, int(sum(checksums)) * n // size

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back weights, optimizer and place of a checkpoint."""
        load_weights(self.model, checkpoint)
        parameters = self.model.named_parameters()
        held = dict(parameters)
        names = [n for n in checkpoint.names("optimizer") if n.rsplit("/", 1)[0] in held]
        tensors = {name: self._read_state(checkpoint, name) for name in names}
        self.optimizer.state.clear()
        restore_optimizer_state(self.optimizer, parameters, tensors)
        self.done = checkpoint.step
        self.train_seconds = checkpoint.state["train_seconds"]
        self.position = checkpoint.state["position"]

    def _read_state(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """What this process holds of a tensor of the optimizer."""
        shape = checkpoint.shape(f"optimizer/{name}")
        place = self.model.shard_of(name.split("/")[0], len(shape))
        box = None if place is None else place[1]
        return checkpoint.read(f"optimizer/{name}", box).to(self.world.device)

    def take_up_records(self) -> None:
        """Cut the records back to where the weights are, and read from them what follows from
        them."""
        self.records.cut_back(self.done)
        self.records.take_up(self.world)
        records = self.records.metrics()
        self.best = Best.of(records)
        off = self.settings.spike_action == "off"
        self.watch = Watch.of(records, threshold=math.inf if off else self.settings.spike_threshold)
        self.batches.rollbacks = rollbacks_of(records)
        # It says the batch after the last step's: a rollback to it is younger than it is. Not so
        # where somebody has deleted or changed the records.
        if self.position not in (None, self.batches.position(self.done - 1) + 1):
            raise ValueError(
                f"{self.folder / METRICS} does not belong to the checkpoint of step {self.done:,}: "
                "what was passed over of the data is not in it"
            )

    def start_over(self, first_weights: Checkpoint | None) -> None:
        """Put back the weights that the run began with."""
        self.model.initialize(self.settings.seed)
        if first_weights is not None:
            load_weights(self.model, first_weights)
        self.optimizer.state.clear()
        self.done, self.position, self.train_seconds = 0, None, 0.0

    @property
    def has_lost_patience(self) -> bool:
        """Whether so many evaluations were no better that the run ends here."""
        patience = self.settings.patience
        return patience is not None and self.best.since >= patience

    def save(self, *, wait: bool = False) -> None:
        """Save this step, and then forget all but the newest, the best and the milestones.

        Training goes on meanwhile, unless it is to `wait`. CannotSave once the disk has failed
        several times, or has failed to keep what must be kept now.
        """
        began, settings = time.perf_counter(), self.settings
        # The best by held-out text, and the one that a rollback would go to.
        due_every = settings.save_every or 1
        wanted = (self.best.step or 0, self.done // due_every * due_every)
        protect = [self.checkpoints / checkpoint_name(step) for step in wanted]
        state = {
            "train_seconds": self.train_seconds,
            "total_seconds": time.perf_counter() - self.began,
            "position": self.batches.position(self.done),
            "records": self.records.sums() if self.world.is_main else {},
            **self.identity,
        }

        def forget() -> None:
            keep, every = settings.keep_checkpoints, settings.keep_every
            prune(self.checkpoints, keep=keep, protect=protect, every=every)

        self._has_ended(self.saver.wait)  # the save before, which says nothing of this one

        def begin() -> bool:
            if not (self.checkpoints / checkpoint_name(self.done)).exists():
                tensors = self.tensors()
                self.saver.save(
                    step=self.done,
                    tensors=tensors,
                    places=self.places(tensors),
                    state=state,
                    before=self.records.sync,
                    after=forget,
                )
            return wait and self.saver.wait()

        self._has_ended(begin, at_once=wait)
        self.stalled_seconds += time.perf_counter() - began

    def poll_saver(self) -> None:
        """Say it if a save has failed."""
        self._has_ended(self.saver.poll)

    def finish_saving(self) -> None:
        """Wait for the save at hand; CannotSave if it fails."""
        self._has_ended(self.saver.wait, at_once=True)

    def _has_ended(self, ask: Callable[[], bool], *, at_once: bool = False) -> None:
        """Ask whether a save has ended, and count its failures: in a row, and in each process
        alike."""
        try:
            if ask():
                self.failed_saves = 0
        except OSError as error:
            self._failed(error, at_once=at_once)

    def _failed(self, error: OSError, *, at_once: bool) -> None:
        self.failed_saves += 1
        text = f"a checkpoint could not be saved: {error}"
        if at_once or self.failed_saves >= MOST_FAILED_SAVES:
            raise CannotSave(f"{text}; make room, then: --resume") from error
        self.screen.line(
            f"{text}; training goes on, and stops after {MOST_FAILED_SAVES} such failures",
            style="bold red",
        )


def load_weights(model: ParallelModel, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model of the same shape: of each what this process
    holds."""
    model.reshard()
    with torch.no_grad():
        for name, shard in model.shards.items():
            shard.local.copy_(checkpoint.read(f"model/{name}", shard.bounds))


def begin(
    folder: Path,
    *,
    data: PreparedData,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    settings: TrainConfig,
    parallel: ParallelConfig,
    world: World,
    screen: Screen,
    identity: Mapping[str, Any],
    eval_tasks: Sequence[EvalTask] = (),
    eval_tasks_every: int | None = None,
) -> Run:
    """A run before its first step. OSError where the disk has no room for its checkpoints."""
    laid_out = build_model(data, model, settings, parallel, world)
    # Weights, and two numbers of memory beside each that is no row of a table; two checkpoints, of
    # which a run that goes on has one already.
    n_bytes = sum(
        p.numel() * p.element_size() * (1 if role_of(name, p) == "lookup" else 3)
        for name, p in laid_out.lm_loss.decoder.named_parameters()
    )
    n_new = 1 if list_checkpoints(folder / "checkpoints") else 2
    if world.is_main:
        check_free_space(folder, n_bytes=n_new * n_bytes, n_files=20)
    return Run(
        folder=folder,
        data=data,
        batches=training_batches(data, model, settings, parallel, world),
        model=laid_out,
        parallel=parallel,
        optimizer=build_updates(laid_out, optimizer, settings),
        settings=settings,
        world=world,
        screen=screen,
        records=Records(folder, writes=world.is_main),
        saver=BackgroundSaver(folder / "checkpoints", world),
        identity=identity,
        eval_tasks=eval_tasks,
        eval_tasks_every=eval_tasks_every,
    )


def newest_of(folder: Path, *, run: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint of a run, and what was wrong with newer ones; one of another run
    that lies there is a ValueError."""
    checkpoint, complaints = newest_good(folder / "checkpoints")
    if checkpoint is not None and checkpoint.state.get("run") != run:
        raise ValueError(
            f"{checkpoint.path} is a checkpoint of another run; take it out of {folder}"
        )
    return checkpoint, complaints
