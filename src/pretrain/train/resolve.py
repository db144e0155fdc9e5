"""Fill every empty field of a config, once, before the run starts.

A config and the prepared text come in; a config with a value in every field that training reads
goes out, is written to config.yaml, and is read back on a resume. ValueError where sizes do not fit
together: a context that is longer than the text, a batch that is not a multiple of the context, a
model that does not fit into memory. Only `measure_pace` needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

from pretrain.config import RunConfig
from pretrain.data.format import MixedData, PreparedData, StandingData, is_prepared
from pretrain.data.order import Order, ceil_div
from pretrain.machine import free_memory, memory_bytes, n_local_processes
from pretrain.model.config import MAX_TABLE_ROWS, ModelConfig, n_parameters
from pretrain.parallel.config import ParallelConfig
from pretrain.tokenizer.config import N_BYTES_VOCABULARY
from pretrain.train.config import Device, Precision, TrainConfig, batch_errors, filled
from pretrain.validation import raise_errors

if TYPE_CHECKING:
    from pretrain.distributed import World
    from pretrain.evaluate.task_files import EvalTask

DEFAULT_CONTEXT = 128
DEFAULT_BATCH_TOKENS = 8192
# Tables are read for one epoch, and a small text must have enough updates in it: 500 kB of a novel
# reached 1.896 bits per byte in 50 updates and 1.874 in 200, 50 kB 2.671 in 20 and 2.559 in 80.
TABLE_BATCH_TOKENS = 4096
UPDATES_OF_AN_EPOCH = 128
# Tokens of a micro-batch on a GPU; on a CPU as many as keep a layer's activations, 3 MB in float32,
# in its caches.
MICRO_BATCH_TOKENS = {"mps": 8192, "cuda": 32_768}
CACHED_ACTIVATIONS = 3 << 18
# Below this vocabulary size a token is about a character, so n-grams of tokens reach further.
SMALL_VOCABULARY = 1024
EVALUATIONS = 10
# The gain of each further network is half of that of the one before, or less.
MOST_WITH_TABLES, MOST_MEMBERS = 4, 8
# Epochs of a network without tables, which has dropout.
MEAN_EPOCHS, MOST_EPOCHS = 10, 16
MOST_MEMBER_BYTES = 1 << 31
# The share of the held-out loss beyond which its standard error is too large, so that it is said,
# and other parts of the text are held out too, if there is time.
MAX_ERROR = 0.03
# Of fewer held-out bytes the error is above it: times the root of the bytes it is 0.7 to 1.6 in
# four novels, 1.1 to 2.5 in Wikipedia, 1.6 to 4 in Python code (docs/notebook/small-texts.md).
ROUGH_VAL_BYTES = 2500
# Of the networks that would fit by the trial: one that misses the end of its epoch is worth less.
SURE_SHARE = 0.85
# Fewer where they would take more than this part of the minutes.
MOST_EVALUATING = 0.25
# Of a larger text, to see whether it helps. Counts of English speeches take 1.6 to 8.6 % off the
# loss of English captions, articles and novels, 0 to 0.7 % off that of German, French and Python.
MOST_COUNTED_TOKENS = 1 << 20
LEAST_HELP = 0.01
# Of Python, torch and the libraries, before a model is built.
FIRST_BYTES = 370_000_000
# Upper limits of a timed trial.
TRIAL_SECONDS = 2.5
TRIAL_STEPS = 20
# Seconds of in-loop tasks for each second of training, where evaluate.every is empty.
TASK_TIME_SHARE = 0.03


class Pace(NamedTuple):
    """What a timed trial measured."""

    step_seconds: float
    task_seconds: float = 0.0
    """of all in-loop tasks, once"""


def resolve(
    config: RunConfig, data: PreparedData, world: World, tasks: Sequence[EvalTask] = ()
) -> RunConfig:
    """Fill every empty field. Takes seconds where `train.minutes` must be converted to steps, or
    in-loop tasks have no interval; otherwise nothing is timed."""
    if isinstance(data, StandingData):
        check_base(data)
    config = fit_batch(config, data, world)
    train = config.train
    if train.steps is None and train.minutes is None:
        # Sources of a mixture may have a number of epochs instead, which sets the length.
        tokens = data.tokens_for_epochs if isinstance(data, MixedData) else None
        if tokens is None:
            raise ValueError("train.steps or train.minutes must be given, to set the length")
        train = replace(train, steps=max(1, round(tokens / filled(train.batch_tokens))))
        config = replace(config, train=train)

    pace = None
    if train.steps is None or (tasks and config.evaluate.every is None):
        pace = measure_pace(config, data, world, tasks)
    config = fit_steps(config, data, pace)

    from pretrain.train.build import training_batches

    training_batches(config, data, world)  # raises ValueError for an order that cannot be
    return config


def check_base(data: StandingData) -> None:
    """ValueError if the larger text knows nothing of the text, as one in another language: if its
    counts take less than LEAST_HELP off the loss of the text's own counts, in a mean of both."""
    import torch

    from pretrain.model.counts import kneser_ney
    from pretrain.model.mixture import held_out_probabilities

    val = data.own.split("val")
    val_ids = val.read(0, min(val.n_tokens, MOST_COUNTED_TOKENS))
    columns = []
    for text, order in ((data.own, 5), (data.base, 3)):
        stream = text.split("train")
        ids = stream.read(0, min(stream.n_tokens, MOST_COUNTED_TOKENS))
        *_, p = kneser_ney(ids, val_ids, vocab_size=data.manifest.vocab_size, order=order)
        columns.append(torch.from_numpy(p[1:]))
    p_NP = torch.stack(columns, dim=1)
    n_bytes = data.tokenizer().byte_lengths[val_ids[1:]].sum()
    own, both = (
        -float(p.log2().sum()) / max(1, n_bytes) for p in (p_NP[:, 0], held_out_probabilities(p_NP))
    )
    if both > (1 - LEAST_HELP) * own:
        raise ValueError(
            f"data.base {data.names[0]} does not help here: counts of the text alone give "
            f"{own:.3f} bits/byte of the held-out text, with counts of the larger text "
            f"{both:.3f}; these must be {LEAST_HELP:.0%} less, as where both are of one kind (in "
            "language, or code); train without it"
        )


# --- batch, device, precision ---------------------------------------------------------------------


def fit_batch(config: RunConfig, data: PreparedData, world: World) -> RunConfig:
    """Fill context, batch, micro-batch, axes and arithmetic; ValueError for a model that the axes
    do not divide or that does not fit into memory."""
    model, train = config.model, config.train
    context, batch_tokens = check_batch(
        model,
        train,
        n_tokens=data.min_source_tokens,
        n_train_tokens=data.split("train").n_tokens,
    )
    model = replace(model, context_length=context)
    vocab_size, device = data.manifest.vocab_size, world.device.type
    if model.ngram_rows is None:
        model = replace(model, ngram_rows=fit_table_rows(data.split("train").n_tokens))
    if model.ngram_rows and model.longest_ngram is None:
        model = replace(model, longest_ngram=6 if vocab_size < SMALL_VOCABULARY else 3)

    parallel = replace(config.parallel, processes=world.size)
    axes = parallel.resolve(world.size)
    check_model_fits(model, axes, vocab_size=vocab_size)
    _, n_readers = axes.batch_part(0)
    rows = batch_tokens // context
    # The deterministic reduction needs the same micro-batches for any number of processes.
    own_rows = rows if parallel.elastic else ceil_div(rows, n_readers)
    compile_choice = train.compile
    if compile_choice == "auto":
        compile_choice = "on" if device == "cuda" else "off"
    train = replace(
        train,
        # The number of steps replaces the minutes of a recipe.
        minutes=train.minutes if train.steps is None else None,
        batch_tokens=batch_tokens,
        micro_batch_rows=train.micro_batch_rows or fit_micro_batch(own_rows, model, device),
        device=cast(Device, device),
        threads=world.threads,
        precision=resolve_precision(train, world),
        compile=compile_choice,
    )
    return replace(config, model=model, parallel=parallel, train=train)


def check_batch(
    model: ModelConfig, train: TrainConfig, *, n_tokens: int, n_train_tokens: int
) -> tuple[int, int]:
    """The context length and the batch size in tokens for a training text of `n_train_tokens`, of
    which the smallest source has `n_tokens`.

    ValueError for a context that is longer than the text, a batch that is not a multiple of the
    context, and a micro-batch that is larger than the batch.
    """
    context = model.context_length
    if context is None:
        # A power of 2, so that a batch stays a multiple of it for every model.size; at least eight
        # windows, so that even a page of text can be shuffled.
        context = DEFAULT_CONTEXT << ((model.size or 1).bit_length() - 1)
        while context > 8 and n_tokens < 8 * context:
            context //= 2
    try:
        Order(n_tokens, context, seed=0)
    except ValueError as error:
        raise ValueError(f"model.context_length is too long: {error}") from None

    most = DEFAULT_BATCH_TOKENS
    if model.rows_of_a_table:
        fitting = 1 << max(0, (n_train_tokens // UPDATES_OF_AN_EPOCH).bit_length() - 1)
        most = min(TABLE_BATCH_TOKENS, fitting)
    batch_tokens = train.batch_tokens or max(1, most // context) * context
    rows = train.micro_batch_rows
    raise_errors(batch_errors(batch_tokens, context_length=context, micro_batch_rows=rows))
    return context, batch_tokens


def fit_table_rows(n_train_tokens: int) -> int:
    """The rows of an n-gram table for a text, fewer than it has n-grams: 45,000 bytes of a novel
    reached 2.405 bits per byte with 8,192 rows and 2.392 with 131,072, in 0.4 of the time and a
    third of the memory."""
    return min(MAX_TABLE_ROWS, 1 << max(10, (n_train_tokens // 4).bit_length() - 1))


def check_model_fits(model: ModelConfig, axes: ParallelConfig, *, vocab_size: int) -> None:
    """ValueError for a model whose sizes the axes do not divide, that has a part which cannot be
    split, or whose weights and gradients alone do not fit into this machine's memory."""
    raise_errors(axes.model_errors(model))
    if axes.tensor > 1:
        import torch

        from pretrain.model.layers import Block
        from pretrain.parallel.tensor import block_plan

        with torch.device("meta"):
            block_plan(Block(model, layer=0))
    # Each replica is sharded over several processes, some of which are on this machine.
    assert axes.data is not None
    replicas_here = n_local_processes() * axes.data / axes.processes
    n, available = n_parameters(model, vocab_size=vocab_size), memory_bytes()
    needed = 8 * n * replicas_here  # float32 weights and gradients
    if available is not None and needed > available:
        raise ValueError(
            f"a model of {n:,} parameters needs {int(needed):,} bytes for weights and gradients "
            f"alone, and this machine has {available:,}; lower model.d_model, n_layers or "
            "ngram_rows"
        )


def checkpoint_bytes(config: RunConfig, vocab_size: int) -> int:
    """Return the bytes of weights, their averages, and two numbers of optimizer state for each
    weight that is not in a lookup table."""
    n_all = n_parameters(config.model, vocab_size=vocab_size)
    in_tables = config.model.table_rows(vocab_size) * config.model.d_model
    return 4 * (3 * n_all - 2 * in_tables + n_all * (config.train.ema_decay > 0))


def expected_memory(config: RunConfig, vocab_size: int, n_train_tokens: int) -> int:
    """Return about how many bytes of memory a run of one process takes on a CPU, within a tenth of
    what ten runs of 2 to 54 million parameters took: with torch, gradients, both moments, and the
    copy that a checkpoint is saved from. Of a table few rows have a gradient."""
    from pretrain.model.counts import BYTES_PER_TOKEN, WHOLE_TOKENS, n_counted

    model, train = config.model, config.train
    n_all = n_parameters(model, vocab_size=vocab_size)
    in_tables = model.table_rows(vocab_size) * model.d_model
    of_block = 12 * model.d_model + 2 * model.n_heads * model.window_tokens
    activations = model.n_layers * of_block + vocab_size
    n_rows_tokens = filled(train.micro_batch_rows) * model.window_tokens
    needed = 28 * (n_all - in_tables) + 7 * in_tables + 4 * n_rows_tokens * activations
    needed += 8 * n_all * (train.ema_decay > 0)
    if (train.members or 1) > 1 or train.counts:
        needed += 4 * n_all + 30 * min(n_train_tokens, WHOLE_TOKENS)
    if train.counts:  # while they are counted the optimizer is gone
        needed = max(needed, 4 * n_all + BYTES_PER_TOKEN * n_counted(n_train_tokens))
    return FIRST_BYTES + needed


def fit_micro_batch(rows: int, model: ModelConfig, device_type: str) -> int:
    """The largest divisor of a batch's rows that the device computes efficiently at once."""
    tokens = MICRO_BATCH_TOKENS.get(device_type, CACHED_ACTIVATIONS // model.d_model)
    most = min(rows, max(1, tokens // model.window_tokens))
    return next(size for size in range(most, 0, -1) if rows % size == 0)


def resolve_precision(train: TrainConfig, world: World) -> Precision:
    """bf16 where the device supports it natively; on a CPU only for a run limited by minutes.

    A run limited by steps gives the same losses on every CPU, so it must not depend on the
    processor.
    """
    if train.precision != "auto":
        return train.precision
    is_timed = train.steps is None and train.minutes is not None
    is_preferred = world.device.type == "cuda" or (world.device.type == "cpu" and is_timed)
    return "bf16" if is_preferred and world.has_native_bf16() else "fp32"


# --- steps ----------------------------------------------------------------------------------------


def fit_steps(config: RunConfig, data: PreparedData, pace: Pace | None) -> RunConfig:
    """Fill the number of steps, for train.minutes from a measured pace, and what depends on it:
    intervals and warm-up."""
    from pretrain.model.counts import check_counts

    train, schedule, evaluate = config.train, config.schedule, config.evaluate
    check_members(train, config.parallel.processes)
    n_evaluations = EVALUATIONS
    most = max_steps(config, data)
    if train.steps is None:
        assert pace is not None
        step_and_tasks = pace.step_seconds
        if evaluate.every is not None:
            step_and_tasks += pace.task_seconds / evaluate.every
        elif pace.task_seconds:
            step_and_tasks += TASK_TIME_SHARE * pace.step_seconds
        given = 60 * filled(train.minutes)
        evaluating = _evaluating_steps(data, train) * pace.step_seconds
        if train.members is None and most is not None:
            seconds = most * step_and_tasks + min(evaluating, MOST_EVALUATING * given)
            train = replace(train, members=fit_members(config, data, given / seconds))
        given /= train.members or 1
        share = min(1.0, MOST_EVALUATING * given / max(evaluating, 1e-9))
        n_evaluations = max(1, int(share * EVALUATIONS))
        # After one step the clock can correct the plan, so it has a second one at least.
        fitting = max(2, int((given - share * evaluating) / step_and_tasks))
        train = replace(train, steps=min(fitting, most or fitting))
        has_epochs = most is not None or isinstance(data, StandingData)
        if train.counts is None and has_epochs and config.parallel.processes == 1:
            train = replace(train, counts=fit_counts(data))
    check_counts("train.counts", train.counts or 0, data.manifest.vocab_size)

    steps = filled(train.steps)
    every = train.evaluate_every or max(1, ceil_div(steps, n_evaluations))
    train = replace(train, evaluate_every=every, save_every=train.save_every or every)
    train = replace(train, members=train.members or 1, counts=train.counts or 0)
    if schedule.warmup_steps is None:
        schedule = replace(schedule, warmup_steps=min(max(10, steps // 50), steps // 2))
    if evaluate.every is None and pace is not None and pace.task_seconds:
        evaluate = replace(evaluate, every=task_interval(train, pace))
    return replace(config, train=train, schedule=schedule, evaluate=evaluate)


def check_members(train: TrainConfig, n_processes: int) -> None:
    """ValueError for a mean of networks and counts, which one process makes, in several."""
    if n_processes > 1 and ((train.members or 1) > 1 or train.counts):
        raise ValueError(
            f"train.members is {train.members} and train.counts {train.counts}; in {n_processes} "
            "processes they must be 1 and 0; average runs afterwards: pretrain mix RUN RUN "
            "--counts 5 --out DIR"
        )


def max_steps(config: RunConfig, data: PreparedData) -> int | None:
    """Upper bound on the steps of a time budget, or None: n-gram tables overfit after one epoch:
    the recipe `english` reached 1.302 bits per byte in one, 1.320 in one and a half. Of a text that
    stands on a larger one, that is read once: 50 kB reached 2.219 while it was, 2.997 after four
    epochs of it."""
    if not config.model.ngram_rows or config.train.minutes is None:
        return None
    if isinstance(data, StandingData):
        n_tokens = data.tokens_for_epochs
    elif isinstance(data, MixedData):
        return None
    else:
        n_tokens = data.split("train").n_tokens
    return ceil_div(n_tokens, filled(config.train.batch_tokens))


def fit_members(config: RunConfig, data: PreparedData, n_fitting: float) -> int:
    """The networks of a run whose minutes suffice for an epoch of `n_fitting` with tables: as many,
    or one and some without tables, which need many epochs. More of them help less and less, and all
    are in memory when the model is used. One of a text whose other parts will be held out: others
    add nothing to the counts of so small a text, and the parts need the time."""
    if config.parallel.processes > 1 or is_tiny(config, data):
        return 1
    is_small = n_fitting > 1 + least_epochs(data.split("train").n_tokens)
    if is_small and not isinstance(data, StandingData):
        return 1 + max(1, min(round((n_fitting - 1) / MEAN_EPOCHS), MOST_MEMBERS - 1))
    n_bytes = 4 * n_parameters(config.model, vocab_size=data.manifest.vocab_size)
    n = int(SURE_SHARE * n_fitting)
    return max(1, min(n, MOST_WITH_TABLES, MOST_MEMBER_BYTES // n_bytes))


def is_tiny(config: RunConfig, data: PreparedData) -> bool:
    """Whether a run is expected to hold out further parts of its text."""
    return can_hold_out_others(config) and data.split("val").n_bytes < ROUGH_VAL_BYTES


def can_hold_out_others(config: RunConfig) -> bool:
    """Whether a run may hold out further parts of its text in the minutes that it does not need:
    one process, one text that is not prepared, a schedule that the clock follows, and no other
    model, which may have read the text."""
    data, train = config.data, config.train
    others = [data.fold, data.mixture, data.base, train.init_from, train.teacher]
    if any(others) or any(map(is_prepared, data.paths)) or train.minutes is None:
        return False
    return config.parallel.processes == 1 and config.schedule.name == "wsd"


def least_epochs(n_train_tokens: int) -> float:
    """The epochs that a network without tables needs to be worth more than one with tables: 6, or 2
    million tokens, if they are fewer.

    Beside a network with tables and counts, 3 epochs of 500 kB were worth nothing (1.848 -> 1.845
    bits per byte) and 10 much (1.814), as were 3 of 2.8 MB (1.886 -> 1.853); a second one with
    tables gives 1.837 of 500 kB.
    """
    return min(6.0, max(2.0, 2e6 / max(1, n_train_tokens)))


def fit_counts(data: PreparedData) -> int:
    """The length of the n-grams that are counted: 7 for a vocabulary of bytes, else 5, or the
    longest that can be counted."""
    from pretrain.model.counts import longest_counted

    vocab_size = data.manifest.vocab_size
    return min(7 if vocab_size <= N_BYTES_VOCABULARY else 5, longest_counted(vocab_size))


def task_interval(train: TrainConfig, pace: Pace) -> int:
    """Steps between two evaluations of the in-loop tasks.

    The smallest multiple of evaluate_every (whose steps are saved too) at which tasks take no more
    than TASK_TIME_SHARE of the training time; the last step alone if one evaluation takes more.
    """
    steps, every = filled(train.steps), filled(train.evaluate_every)
    times = int(TASK_TIME_SHARE * steps * pace.step_seconds / max(pace.task_seconds, 1e-9))
    return steps if times <= 1 else min(steps, ceil_div(steps, times * every) * every)


def _evaluating_steps(data: PreparedData, train: TrainConfig) -> float:
    """Training steps that take as long as all evaluations, which have no backward pass: two thirds
    of a step."""
    val_tokens = min(train.evaluate_tokens, data.split("val").n_tokens)
    return EVALUATIONS * val_tokens / filled(train.batch_tokens) / 3


# --- a timed trial --------------------------------------------------------------------------------


def measure_pace(
    config: RunConfig, data: PreparedData, world: World, tasks: Sequence[EvalTask] = ()
) -> Pace:
    """Time some steps, and the in-loop tasks, of a model that is thrown away.

    With a known number of steps at most about a hundredth of them is made. Without tasks the trial
    ends early at a pace at which train.minutes suffice for `max_steps`.
    """
    from pretrain.evaluate.loss import ScoredModel
    from pretrain.evaluate.run_tasks import evaluation_seconds
    from pretrain.train.build import build_model, trial_steps, uncompiled

    train = config.train
    fast_enough = 0.0
    most = None if train.steps or tasks else max_steps(config, data)
    if most is not None and train.minutes is not None:
        fast_enough = 60 * train.minutes / (most + _evaluating_steps(data, train))

    n_steps = min(TRIAL_STEPS, max(1, (train.steps or 10**9) // 200))
    seconds, total = [], 0.0
    for step, latest in enumerate(trial_steps(config, data, world, steps=n_steps + 2)):
        is_warm_up = step < 2  # of caches and memory
        if not (is_warm_up and train.compile == "on"):  # compiling is not part of a step's time
            total += latest
        is_long = total > TRIAL_SECONDS
        if is_long or not is_warm_up:
            seconds.append(latest)
        # Rank 0 decides for all ranks, so that they stop at the same step.
        if world.all_gather([bool(seconds) and (is_long or seconds[-1] <= fast_enough)])[0][0]:
            break
    # The first quartile: other work on the machine only ever makes a step slower. Ranks other than
    # 0 may have no samples, since they started timing later.
    step_seconds = sorted(seconds)[len(seconds) // 4] if seconds else math.nan

    task_seconds = 0.0
    if tasks:
        decoder = build_model(config, data, world)[0].lm_loss.decoder
        model = ScoredModel(decoder, data.tokenizer(), world, train.precision)
        with uncompiled():
            task_seconds = evaluation_seconds(model, tasks)
    free_memory()
    step_seconds, task_seconds = world.all_gather([step_seconds, task_seconds])[0]
    return Pace(step_seconds, task_seconds)
