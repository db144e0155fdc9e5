"""What is chosen automatically, chosen once: every empty field of a config gets its value here,
before the start.

The filled config is written to the run's config.yaml and read back on a resume, so nothing is ever
decided twice. Refuses what does not fit together: a context that the text is too short for, a batch
that is not whole windows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from pretrain.data import MicroBatch, PreparedData
from pretrain.data.mixed import MixedData
from pretrain.distributed import World, memory_bytes, n_local_processes
from pretrain.evaluate import EvalTask
from pretrain.evaluate.config import EvaluateConfig
from pretrain.evaluate.run_tasks import evaluation_seconds
from pretrain.model import ModelConfig, n_parameters
from pretrain.optim import OptimizerConfig, ScheduleConfig
from pretrain.parallel import ParallelConfig
from pretrain.train.build import build_model, build_updates, training_batches, uncompiled
from pretrain.train.config import Compile, Device, Precision, TrainConfig
from pretrain.train.steps import StepReport, training_steps
from pretrain.train.windows import check_windows

# Rows that go through the model at once: on a CPU as many as fill its caches with a layer's
# activations, 3 MB each.
MICRO_BATCH_TOKENS = {"mps": 8192, "cuda": 32_768}
CACHED_ACTIVATIONS = 3 << 18
# Below it an id is about a character, and six of them are no more than three ids of a larger one.
SMALL_VOCABULARY = 1024
EVALUATIONS = 10
# n-gram tables learn a text by heart in its second reading: the recipe `english` came to 1.302 bits
# a byte in one, and to 1.320 in one and a half. So few steps are made all the same.
SHORT_RUN = 300
# Seconds of the budget that a timed calibration may take, and its steps at most.
CALIBRATION_SECONDS, CALIBRATION_STEPS = 2.5, 20
# Seconds of asking tasks for each of training, where nobody says how often they are asked.
TASKS_SHARE = 0.03


@dataclass(frozen=True, slots=True)
class Decided:
    """The sections of a config that had empty fields, filled."""

    model: ModelConfig
    schedule: ScheduleConfig
    train: TrainConfig
    parallel: ParallelConfig
    evaluate: EvaluateConfig


def decide(
    *,
    data: PreparedData,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    train: TrainConfig,
    world: World,
    parallel: ParallelConfig | None = None,
    evaluate: EvaluateConfig | None = None,
    eval_tasks: Sequence[EvalTask] = (),
) -> Decided:
    """Fill every empty field. Takes seconds when `train.minutes` must be turned into steps, or
    tasks are `eval_tasks`, else none."""
    context, batch_tokens = check_windows(model, train, n_tokens=data.min_source_tokens)
    model = replace(model, context_length=context)
    if model.ngram_rows and model.longest_ngram is None:
        small = data.manifest.vocab_size < SMALL_VOCABULARY
        model = replace(model, longest_ngram=6 if small else 3)
    parallel = replace(parallel or ParallelConfig(), processes=world.size)
    axes = parallel.resolve(world.size)
    _refuse_what_does_not_fit(model, axes, vocab_size=data.manifest.vocab_size)
    _, n_readers = axes.batch_shard(0)
    rows = batch_tokens // context
    # The elastic order is one of micro-batches that are the same for any number of processes.
    each = rows if parallel.elastic else -(-rows // n_readers)
    if train.steps is not None:
        train = replace(train, minutes=None)  # what is left of a recipe, and decides nothing
    train = replace(
        train,
        batch_tokens=batch_tokens,
        micro_batch_rows=train.micro_batch_rows or micro_batch_rows(each, model, world.device.type),
        device=cast(Device, world.device.type),
        threads=world.threads,
        precision=decided_precision(train, world),
        compile=_compile(train.compile, world),
    )
    if train.steps is None and train.minutes is None and isinstance(data, MixedData):
        train = replace(train, steps=_steps_of_epochs(data, batch_tokens))
    evaluate = evaluate or EvaluateConfig()
    if train.steps is None and train.minutes is None:
        raise ValueError("nothing says how long to train: give train.steps or train.minutes")
    pace = None
    if train.steps is None or (eval_tasks and evaluate.every is None):
        pace = measure_pace(data, model, optimizer, train, parallel, world, eval_tasks)
    if train.steps is None:
        assert pace is not None
        fit = _steps_that_fit(data, model, train, pace, eval_tasks_every=evaluate.every)
        train = replace(train, steps=fit)
    steps = train.steps
    assert steps is not None
    training_batches(data, model, train, parallel, world)  # the order, refused here if it cannot be
    every = train.evaluate_every or max(1, -(-steps // EVALUATIONS))
    train = replace(train, evaluate_every=every, save_every=train.save_every or every)
    if pace is not None and eval_tasks and evaluate.every is None:
        evaluate = replace(evaluate, every=task_interval(train, pace))
    if schedule.warmup_steps is None:
        schedule = replace(schedule, warmup_steps=min(max(10, steps // 50), steps // 2))
    return Decided(model, schedule, train, parallel, evaluate)


@dataclass(frozen=True, slots=True)
class Pace:
    """What was timed before the start."""

    step_seconds: float
    evaluation_seconds: float = 0.0
    """of all tasks that are followed, once"""


def task_interval(train: TrainConfig, pace: Pace) -> int:
    """Steps between two times that tasks are asked: the fewest evaluations apart (whose steps are
    saved, too) that cost no more than TASKS_SHARE of training, all in all. Where not even one does,
    they are asked after the last step alone."""
    steps, every = train.steps, train.evaluate_every
    assert steps is not None
    assert every is not None
    times = int(TASKS_SHARE * steps * pace.step_seconds / max(pace.evaluation_seconds, 1e-9))
    if times <= 1:
        return steps
    return min(steps, -(-steps // (times * every)) * every)


def _refuse_what_does_not_fit(model: ModelConfig, axes: ParallelConfig, *, vocab_size: int) -> None:
    """ValueError, before anything of it is built, for a model whose sizes the axes do not divide,
    now that all of them are known, or of which not even weights and gradients fit here."""
    for _, mistake in axes.mistakes_of_model(model):
        raise ValueError(mistake)
    n, there = n_parameters(model, vocab_size=vocab_size), memory_bytes()
    assert axes.data is not None
    # Of a copy each process has a part, and several of them may be on this machine.
    share = n_local_processes() * axes.data / axes.processes
    if there is not None and 2 * 4 * n * share > there:
        raise ValueError(
            f"a model of {n:,} parameters needs {int(8 * n * share):,} bytes for weights and "
            f"gradients alone, and this machine has {there:,}; lower model.d_model, n_layers or "
            "ngram_rows"
        )


def _steps_of_epochs(data: MixedData, batch_tokens: int) -> int | None:
    """Updates that read every source as often as it is asked for."""
    tokens = data.tokens_for_epochs
    return None if tokens is None else max(1, round(tokens / batch_tokens))


def micro_batch_rows(rows: int, model: ModelConfig, device_type: str) -> int:
    """The largest divisor of a batch's rows that the device takes at once."""
    tokens = MICRO_BATCH_TOKENS.get(device_type, CACHED_ACTIVATIONS // model.d_model)
    most = max(1, tokens // model.window_tokens)
    return next(m for m in range(min(most, rows), 0, -1) if rows % m == 0)


def decided_precision(train: TrainConfig, world: World) -> Precision:
    """bf16 where the device has units for it; on a CPU only for a run that is given minutes: one
    that is given steps repeats on any other, whose losses do not then hang on the processor."""
    if train.precision != "auto":
        return train.precision
    is_timed = train.steps is None and train.minutes is not None
    wanted = world.device.type == "cuda" or (world.device.type == "cpu" and is_timed)
    return "bf16" if wanted and world.has_native_bf16() else "fp32"


def _compile(choice: Compile, world: World) -> Compile:
    if choice != "auto":
        return choice
    return "on" if world.device.type == "cuda" else "off"


def _steps_that_fit(
    data: PreparedData,
    model: ModelConfig,
    train: TrainConfig,
    pace: Pace,
    *,
    eval_tasks_every: int | None,
) -> int:
    """Updates that fit into `train.minutes`; with n-gram tables no more than one reading of the
    text makes, or SHORT_RUN."""
    assert train.minutes is not None
    evaluating = _evaluating_steps(data, train) * pace.step_seconds
    asking = TASKS_SHARE * pace.step_seconds if pace.evaluation_seconds else 0.0
    if eval_tasks_every is not None:
        asking = pace.evaluation_seconds / eval_tasks_every
    fit = max(1, int((60 * train.minutes - evaluating) / (pace.step_seconds + asking)))
    return min(fit, most_steps(data, model, train) or fit)


def _evaluating_steps(data: PreparedData, train: TrainConfig) -> float:
    """Steps that take as long as all evaluations: these have no backward pass, which is two thirds
    of a step."""
    assert train.batch_tokens is not None
    val_tokens = min(train.evaluate_tokens, data.split("val").n_tokens)
    return EVALUATIONS * val_tokens / train.batch_tokens / 3


def _fast_enough(data: PreparedData, model: ModelConfig, train: TrainConfig) -> float:
    """Seconds of a step at which `train.minutes` are enough for all that is to be read; 0 where
    there is always more."""
    most = None if train.steps else most_steps(data, model, train)
    if most is None or train.minutes is None:
        return 0.0
    return 60 * train.minutes / (most + _evaluating_steps(data, train))


def measure_pace(
    data: PreparedData,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    world: World,
    eval_tasks: Sequence[EvalTask] = (),
) -> Pace:
    """Seconds of a step, and of asking tasks, by timed ones of copies that are thrown away: about a
    hundredth of the run's steps at most, where it is given them, and none after one that is fast
    enough for all there is to read."""
    fast_enough = 0.0 if eval_tasks else _fast_enough(data, model, train)
    n_steps = min(CALIBRATION_STEPS, max(1, (train.steps or 10**9) // 200))
    steps = trial_steps(data, model, optimizer, train, parallel, world, steps=n_steps + 2)
    seconds, began = [], time.perf_counter()
    last = began
    for report in steps:
        world.synchronize()
        now = time.perf_counter()
        if report.step < 2 and train.compile == "on":
            began = now  # what a compiler takes is no measure of a step
        # The first two steps warm up caches and memory.
        elif report.step >= 2 or now - began > CALIBRATION_SECONDS:
            seconds.append(now - last)
        last = now
        # The first process has the clock, and all stop at one step.
        is_long = now - began > CALIBRATION_SECONDS
        if world.all_gather([bool(seconds) and (is_long or seconds[-1] <= fast_enough)])[0][0]:
            break
    # The first quarter: what else a machine does now and then only ever makes a step slower.
    # Others than the first may have none, whose clocks began later.
    step_seconds = sorted(seconds)[len(seconds) // 4] if seconds else math.nan
    asking = 0.0
    if eval_tasks:
        trial = build_model(data, model, train, parallel, world)
        asking = uncompiled(evaluation_seconds)(
            trial.lm_loss.decoder,
            data.tokenizer(),
            eval_tasks,
            world=world,
            precision=train.precision,
        )
    return Pace(*world.all_gather([step_seconds, asking])[0])


def trial_steps(
    data: PreparedData,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    world: World,
    *,
    steps: int,
    read: Callable[[Iterable[MicroBatch]], Iterable[MicroBatch]] = iter,
) -> Iterator[StepReport]:
    """The first steps of a run, at hardly any rate, with a model that is thrown away, for
    measurements. Batches are read through `read`."""
    batches = training_batches(data, model, train, parallel, world)
    trial = build_model(data, model, train, parallel, world)
    return training_steps(
        trial,
        build_updates(trial, optimizer, train),
        lambda step: read(batches.at(step)),
        lr_at=lambda step: optimizer.learning_rate * 1e-3,
        steps=steps,
        clip=optimizer.clip,
        world=world,
        precision=train.precision,
    )


def most_steps(data: PreparedData, model: ModelConfig, train: TrainConfig) -> int | None:
    """Beyond how many steps minutes do not lead, if anywhere."""
    assert train.batch_tokens is not None
    if not model.ngram_rows or train.minutes is None or isinstance(data, MixedData):
        return None
    return max(SHORT_RUN, -(-data.split("train").n_tokens // train.batch_tokens))
