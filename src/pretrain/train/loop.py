"""`train()`: the whole run in time's order, from first weights (or a checkpoint) to a summary.

A run directory, prepared data and the filled sections of a config go in; checkpoints, metrics,
samples and summary.json come out. A signal ends it after the running step with everything saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import Checkpoint, checkpoint_name, open_checkpoint, prune, save_checkpoint
from pretrain.data import PreparedData, evaluation_batches
from pretrain.evaluate import Score, byte_lengths, measure_baselines, score
from pretrain.evaluate.scorer import EVALUATION_TOKENS
from pretrain.generate import Sampling, generate
from pretrain.model import ModelConfig, Objective, build
from pretrain.optimizer import OptimizerConfig, ScheduleConfig, build_optimizer, schedule_at
from pretrain.optimizer.grouped import optimizer_state, restore_optimizer_state
from pretrain.train.batches import TrainingBatches
from pretrain.train.config import TrainConfig
from pretrain.train.decide import training_batches
from pretrain.train.records import SUMMARY, Best, Records, write_json
from pretrain.train.screen import Screen
from pretrain.train.signals import StopSignals
from pretrain.train.steps import StepReport, training_steps
from pretrain.world import World

SAMPLE_TOKENS = 60


@dataclass(slots=True)
class Run:
    """A run in memory: what it works on, what it works with, and how far it is."""

    folder: Path
    data: PreparedData
    objective: Objective
    optimizer: torch.optim.Optimizer
    settings: TrainConfig
    world: World
    screen: Screen
    records: Records
    best: Best
    done: int = 0
    """updates made so far"""
    train_seconds: float = 0.0

    @property
    def steps(self) -> int:
        assert self.settings.steps is not None
        return self.settings.steps

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
        restore_optimizer_state(self.optimizer, parameters, tensors)
        self.done = checkpoint.step
        self.train_seconds = checkpoint.state["train_seconds"]


def load_weights(objective: Objective, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model of the same shape."""
    with torch.no_grad():
        for name, parameter in objective.decoder.named_parameters():
            parameter.copy_(checkpoint.read(f"model/{name}"))


def train(
    folder: Path,
    *,
    data: PreparedData,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    settings: TrainConfig,
    world: World,
    screen: Screen,
    fingerprint: Mapping[str, Any],
    began: float,
    first_weights: Checkpoint | None = None,
    resume_from: Checkpoint | None = None,
) -> int:
    """Train to the end, or to a signal; returns an exit code. `began` is the command's start on
    perf_counter. `first_weights` are those of another run that this one starts from."""
    run = _begin(folder, data, model, optimizer, settings, world, screen)
    if resume_from is not None:
        run.restore(resume_from)
    elif first_weights is not None:
        load_weights(run.objective, first_weights)
    run.records.cut_back(run.done)
    run.best = Best.of(run.records.metrics())
    batches = training_batches(data, model, settings)
    updates = training_steps(
        run.objective,
        run.optimizer,
        batches.at,
        rate_at=lambda step: (
            optimizer.learning_rate * schedule_at(step, config=schedule, steps=run.steps)
        ),
        steps=run.steps,
        first_step=run.done,
        clip=optimizer.clip,
        world=world,
        precision=settings.precision,
    )
    with StopSignals() as stop, screen.progress(steps=run.steps, done=run.done):
        clock = time.perf_counter()
        for report in updates:
            world.synchronize()
            seconds = time.perf_counter() - clock
            _note_step(run, report, batches, seconds=seconds)
            is_best = False
            if due(run.done, settings.evaluate_every, run.steps):
                is_best = _evaluate_and_sample(run)
            if due(run.done, settings.save_every, run.steps) or is_best or stop.received:
                _save(run, fingerprint)
            if stop.received and run.done < run.steps:
                return stop.exit_code
            if settings.patience is not None and run.best.since >= settings.patience:
                screen.line(f"no better evaluation in the last {run.best.since}: stopping here")
                _save(run, fingerprint)
                break
            clock = time.perf_counter()
    _finish(run, batches, began)
    return 0


def due(done: int, every: int | None, steps: int) -> bool:
    """Whether something that happens every so many steps happens now; it always does after the
    last."""
    assert every is not None
    return done % every == 0 or done == steps


def _begin(
    folder: Path,
    data: PreparedData,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    settings: TrainConfig,
    world: World,
    screen: Screen,
) -> Run:
    decoder = build(
        model, vocab_size=data.manifest.vocab_size, seed=settings.seed, device=world.device
    )
    if settings.compile == "on":
        decoder.compile(dynamic=False)
    objective = Objective(decoder, seed=settings.seed, label_smoothing=settings.label_smoothing)
    updates = build_optimizer(decoder.named_parameters(), config=optimizer)
    return Run(folder, data, objective, updates, settings, world, screen, Records(folder), Best())


def _note_step(run: Run, report: StepReport, batches: TrainingBatches, *, seconds: float) -> None:
    run.done = report.step + 1
    run.train_seconds += seconds
    loss = report.nats_per_token
    if not (math.isfinite(loss) and math.isfinite(report.grad_norm)):
        raise ValueError(
            f"step {report.step}: the loss is {loss}, the gradient's norm {report.grad_norm}, so "
            f"no update was made; a lower optimizer.learning_rate (now "
            f"{report.learning_rate:.1e}) or a longer schedule.warmup_steps may help. The last "
            f"checkpoint is whole."
        )
    bits_per_byte = report.nats / math.log(2) / batches.n_bytes if batches.n_bytes else math.nan
    tokens = run.done * (run.settings.batch_tokens or 0)
    run.records.add_metrics(
        {
            "kind": "train",
            "step": run.done,
            "tokens": tokens,
            "loss": loss,
            "bits_per_byte": bits_per_byte,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            "tokens_per_second": report.count / seconds,
            "seconds": run.train_seconds,
            "epoch": tokens / run.data.split("train").n_tokens,
            **batches.source_tokens(run.done),
        }
    )
    run.screen.step(
        run.done,
        run.steps,
        loss=loss,
        bits_per_byte=bits_per_byte,
        rate=report.learning_rate,
        speed=report.count / seconds,
    )


def evaluate_split(run: Run, *, whole: bool) -> Score:
    """The held-out split, or the fixed part of it that is looked at during training."""
    context = run.objective.decoder.config.window_tokens
    batches = evaluation_batches(
        run.data.split("val"),
        context_length=context,
        rows=max(1, EVALUATION_TOKENS // context),
        limit_tokens=None if whole else run.settings.evaluate_tokens,
    )
    return score(
        run.objective,
        batches,
        byte_lengths_V=byte_lengths(run.data.tokenizer()),
        world=run.world,
        precision=run.settings.precision,
    )


def _evaluate_and_sample(run: Run) -> bool:
    """Score the fixed part of the held-out split and write a sample; True for a new best score."""
    result = evaluate_split(run, whole=False)
    is_best = run.best.note(run.done, result.nats_per_token)
    run.records.add_metrics(
        {
            "kind": "evaluate",
            "step": run.done,
            "tokens": run.done * (run.settings.batch_tokens or 0),
            "val_nats_per_token": result.nats_per_token,
            "val_perplexity": result.perplexity,
            "val_bits_per_byte": result.bits_per_byte,
            "val_tokens": result.tokens,
            "seconds": run.train_seconds,
        }
    )
    left = (run.steps - run.done) * run.train_seconds / run.done
    run.screen.evaluation(
        run.done,
        nats_per_token=result.nats_per_token,
        bits_per_byte=result.bits_per_byte,
        left_seconds=left,
        best=is_best,
    )
    sampling = Sampling(temperature=0.8, seed=run.settings.seed)
    text = generate(
        run.objective.decoder,
        run.data.tokenizer(),
        "",
        max_tokens=SAMPLE_TOKENS,
        sampling=sampling,
    )[0]
    run.screen.sample(text)
    run.records.add_sample(
        {
            "step": run.done,
            "prompt": "",
            "text": text,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
        }
    )
    return is_best


def _save(run: Run, fingerprint: Mapping[str, Any]) -> None:
    """Save this step, then forget all but the newest and the best."""
    checkpoints = run.folder / "checkpoints"
    newest = checkpoints / checkpoint_name(run.done)
    if not newest.exists():
        state = {"train_seconds": run.train_seconds, "fingerprint": dict(fingerprint)}
        save_checkpoint(checkpoints, step=run.done, tensors=run.tensors(), state=state)
    protect = [checkpoints / checkpoint_name(run.best.step)] if run.best.step is not None else []
    prune(checkpoints, keep=run.settings.keep_checkpoints, protect=protect)


def _finish(run: Run, batches: TrainingBatches, began: float) -> None:
    """Score the best checkpoint on the whole held-out split and write summary.json, the end of the
    run."""
    chosen = run.folder / "checkpoints" / checkpoint_name(run.done)
    best = run.folder / "checkpoints" / checkpoint_name(run.best.step or run.done)
    if best != chosen and best.exists():
        chosen = best
        load_weights(run.objective, open_checkpoint(chosen))
    result = evaluate_split(run, whole=True)
    tokens = run.done * (run.settings.batch_tokens or 0)
    run.screen.line("scoring count tables and xz on the same held-out tokens ...")
    baselines = measure_baselines(
        run.data.split("train"), run.data.split("val"), tokenizer=run.data.tokenizer()
    )
    write_json(run.folder / "baselines.json", baselines)
    summary = {
        "parameters": sum(p.numel() for p in run.objective.parameters()),
        "steps": run.done,
        "tokens": tokens,
        "epochs": tokens / run.data.split("train").n_tokens,
        "val_nats_per_token": result.nats_per_token,
        "val_perplexity": result.perplexity,
        "val_bits_per_byte": result.bits_per_byte,
        "val_tokens": result.tokens,
        "val_bytes": result.bytes,
        "tokens_per_second": tokens / run.train_seconds,
        "train_seconds": run.train_seconds,
        "total_seconds": time.perf_counter() - began,
        "peak_memory_bytes": run.world.peak_memory_bytes(),
        "checkpoint": chosen.relative_to(run.folder).as_posix(),
        "baselines": baselines["baselines"],
        **batches.source_tokens(run.done, epochs=True),
    }
    write_json(run.folder / SUMMARY, summary)
