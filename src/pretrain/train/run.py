"""A run in memory: what it works on and with, how far it is, and how it is kept on the disk."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import (
    BackgroundSaver,
    Checkpoint,
    checkpoint_name,
    list_checkpoints,
    newest_good,
    prune,
)
from pretrain.checkpoint.disk import refuse_little_room
from pretrain.data import PreparedData
from pretrain.evaluate import Followed
from pretrain.model import ModelConfig, Objective, build
from pretrain.optimizer import OptimizerConfig, build_optimizer
from pretrain.optimizer.grouped import optimizer_state, restore_optimizer_state, role_of
from pretrain.train.batches import TrainingBatches
from pretrain.train.config import TrainConfig
from pretrain.train.decide import training_batches
from pretrain.train.records import METRICS, Best, CannotSave, Records
from pretrain.train.screen import Screen
from pretrain.train.watch import Finding, Watch, rollbacks_of
from pretrain.world import World

# A disk that fails once may have been cleared by the next checkpoint; one that fails so often is
# full.
MOST_FAILED_SAVES = 3


@dataclass(slots=True)
class Run:
    """A run in memory: what it works on, what it works with, and how far it is."""

    folder: Path
    data: PreparedData
    batches: TrainingBatches
    objective: Objective
    optimizer: torch.optim.Optimizer
    settings: TrainConfig
    world: World
    screen: Screen
    records: Records
    saver: BackgroundSaver
    identity: Mapping[str, Any]
    """What each checkpoint says of the run: whose it is, and what its numbers hang on."""
    followed: Sequence[Followed] = ()
    """Tasks that are asked every `asked_every` steps, and after the last one."""
    asked_every: int | None = None
    best: Best = field(default_factory=Best)
    watch: Watch = field(default_factory=lambda: Watch(0.0))
    finding: Finding | None = None
    """What is wrong with the step at hand, if anything."""
    done: int = 0
    """updates made so far"""
    position: int | None = None
    """the batch, counted from the start of the data, that a checkpoint says comes next"""
    train_seconds: float = 0.0
    stalled_seconds: float = 0.0
    """time for which training stood still, this time, because of checkpoints"""
    failed_saves: int = 0

    @property
    def steps(self) -> int:
        assert self.settings.steps is not None
        return self.settings.steps

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on and that is a tensor."""
        parameters = list(self.objective.decoder.named_parameters())
        model = {f"model/{name}": p for name, p in parameters}
        state = optimizer_state(self.optimizer, parameters)
        return {**model, **{f"optimizer/{name}": t for name, t in state.items()}}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back weights, optimizer and place of a checkpoint."""
        load_weights(self.objective, checkpoint)
        tensors = {
            name: checkpoint.read(f"optimizer/{name}").to(self.world.device)
            for name in checkpoint.names("optimizer")
        }
        parameters = self.objective.decoder.named_parameters()
        self.optimizer.state.clear()
        restore_optimizer_state(self.optimizer, parameters, tensors)
        self.done = checkpoint.step
        self.train_seconds = checkpoint.state["train_seconds"]
        self.position = checkpoint.state["position"]

    def take_up_records(self) -> None:
        """Cut the records back to where the weights are, and read from them what follows from
        them."""
        self.records.cut_back(self.done)
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
        decoder = self.objective.decoder
        first = build(
            decoder.config,
            vocab_size=decoder.vocab_size,
            seed=self.settings.seed,
            device=self.world.device,
        )
        decoder.load_state_dict(first.state_dict())
        if first_weights is not None:
            load_weights(self.objective, first_weights)
        self.optimizer.state.clear()
        self.done, self.position = 0, None

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
            "position": self.batches.position(self.done),
            "records": self.records.sums(),
            **self.identity,
        }

        def forget() -> None:
            keep, every = settings.keep_checkpoints, settings.keep_every
            prune(self.checkpoints, keep=keep, protect=protect, every=every)
            self.failed_saves = 0

        try:
            self.saver.wait()
            if not (self.checkpoints / checkpoint_name(self.done)).exists():
                self.saver.save(
                    step=self.done,
                    tensors=self.tensors(),
                    state=state,
                    before=self.records.sync,
                    after=forget,
                )
            if wait:
                self.saver.wait()
        except OSError as error:
            self._failed(error, at_once=wait)
        self.stalled_seconds += time.perf_counter() - began

    def poll_saver(self) -> None:
        """Say it if a save has failed."""
        try:
            self.saver.poll()
        except OSError as error:
            self._failed(error, at_once=False)

    def finish_saving(self) -> None:
        """Wait for the save at hand; CannotSave if it fails."""
        try:
            self.saver.wait()
        except OSError as error:
            self._failed(error, at_once=True)

    def _failed(self, error: OSError, *, at_once: bool) -> None:
        self.failed_saves += 1
        text = f"a checkpoint could not be saved: {error}"
        if at_once or self.failed_saves >= MOST_FAILED_SAVES:
            raise CannotSave(f"{text}; make room, then: --resume") from error
        self.screen.line(
            f"{text}; training goes on, and stops after {MOST_FAILED_SAVES} such failures",
            style="bold red",
        )


def load_weights(objective: Objective, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model of the same shape."""
    with torch.no_grad():
        for name, parameter in objective.decoder.named_parameters():
            parameter.copy_(checkpoint.read(f"model/{name}"))


def begin(
    folder: Path,
    *,
    data: PreparedData,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    settings: TrainConfig,
    world: World,
    screen: Screen,
    identity: Mapping[str, Any],
    followed: Sequence[Followed] = (),
    asked_every: int | None = None,
) -> Run:
    """A run before its first step. OSError where the disk has no room for its checkpoints."""
    decoder = build(
        model, vocab_size=data.manifest.vocab_size, seed=settings.seed, device=world.device
    )
    # Weights, and two numbers of memory beside each that is no row of a table; two checkpoints, of
    # which a run that goes on has one already.
    n_bytes = sum(
        p.numel() * p.element_size() * (1 if role_of(name, p) == "lookup" else 3)
        for name, p in decoder.named_parameters()
    )
    n_new = 1 if list_checkpoints(folder / "checkpoints") else 2
    refuse_little_room(folder, n_bytes=n_new * n_bytes, n_files=20)
    assert settings.batch_tokens is not None
    if settings.compile == "on":
        decoder.compile(dynamic=False)
    objective = Objective(
        decoder,
        seed=settings.seed,
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
    )
    return Run(
        folder=folder,
        data=data,
        batches=training_batches(data, model, settings),
        objective=objective,
        optimizer=build_optimizer(
            decoder.named_parameters(),
            config=optimizer,
            width=model.d_model,
            batch_tokens=settings.batch_tokens,
            precision=settings.precision,
        ),
        settings=settings,
        world=world,
        screen=screen,
        records=Records(folder),
        saver=BackgroundSaver(folder / "checkpoints"),
        identity=identity,
        followed=followed,
        asked_every=asked_every,
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
