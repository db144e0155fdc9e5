"""The section `train` of a config: settings of the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pretrain.validation import Checked, FieldError, Range

Value = TypeVar("Value")
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]
_COUNT = Range(1, 10**10)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(Checked):
    """The section `train`."""

    section = "train"

    steps: Annotated[int | None, _COUNT] = None
    """number of updates; empty: as many as fit into train.minutes, which the clock may correct"""
    minutes: Annotated[float | None, Range(gt=0, le=10**7)] = None
    """wall-clock time from the first step to the last, with the evaluations and checkpoints between
    them, without preparing the text, compiling, and what follows the last step; a timed calibration
    at the start plans the steps, and with schedule.name wsd and one source the clock corrects them;
    with n-gram tables (model.ngram_rows) at most one epoch of the text"""
    batch_tokens: Annotated[int | None, _COUNT] = None
    """targets in one update, over all processes; empty: 8,192, with n-gram tables 4,096 and at most
    a 128th of the text, rounded to full windows"""
    micro_batch_rows: Annotated[int | None, _COUNT] = None
    """windows in one forward and backward pass; empty: chosen for the device; changes no result
    beyond rounding"""
    evaluate_every: Annotated[int | None, _COUNT] = None
    """steps between evaluations on held-out text; empty: a tenth of the run"""
    evaluate_tokens: Annotated[int, _COUNT] = 16_384
    """held-out targets of an evaluation during training, always the same ones; the last evaluation
    uses the full split"""
    save_every: Annotated[int | None, _COUNT] = None
    """steps between checkpoints; empty: at every evaluation"""
    keep_checkpoints: Annotated[int, Range(2, 10**10)] = 2
    """number of newest checkpoints to keep, besides the best by validation; at least 2, so that one
    is left when a disk damages the other"""
    keep_every: Annotated[int | None, _COUNT] = None
    """never delete the checkpoints of multiples of this step; empty: keep only the newest and
    best"""
    patience: Annotated[int | None, _COUNT] = None
    """stop after this number of evaluations in a row without a new best; empty: never"""
    members: Annotated[int | None, Range(1, 64)] = None
    """networks that a run trains one after the other, from other random weights each, and whose
    mean probabilities are its model; they share its minutes, and end before these where another one
    does not pay; empty: as many as have time for an epoch with n-gram tables, or one such and some
    without tables that read the text many times; one where other parts are held out too"""
    counts: Annotated[int | None, Range(0, 16)] = None
    """length of the n-grams of tokens whose counts in the text are averaged with the networks
    (Kneser-Ney), of its first 33.5 million tokens, fewer where they take a third of the memory; 0:
    none; empty: 5, of bytes 7, of a vocabulary above 6,207 4 or 3, for a run of minutes with n-gram
    tables or a larger text, in one process"""
    seed: Annotated[int, Range(0, lt=1 << 63)] = 1
    """seed of initial weights, data order and dropout"""
    device: Device = "auto"
    """where to compute; auto chooses cuda, else mps, else cpu"""
    precision: Precision = "auto"
    """number format of matrix products; auto chooses bf16 on a GPU that supports it, and on a CPU
    that supports it if train.minutes is given instead of steps, else fp32"""
    compile: Compile = "auto"
    """compile decoder and loss with torch.compile; auto does so on cuda only, where it saves more
    time than it takes"""
    deterministic: bool = False
    """reject GPU kernels whose result varies from run to run (CPU runs never use any)"""
    ema_decay: Annotated[float, Range(0, lt=1)] = 0.0
    """decay rate per step of an exponential moving average of the weights, which evaluations and
    readers of a checkpoint use in place of the last ones ("Averaging Weights Leads to Wider Optima
    and Better Generalization", Izmailov et al., 2018); at step t at most (1 + t) / (10 + t), a
    ninth of the steps; no gain with the default schedule (docs/notebook/small-texts.md); 0: none"""
    label_smoothing: Annotated[float, Range(0, lt=1)] = 0.0
    """fraction of each target's probability that is spread over the vocabulary (Vaswani et al.,
    2017: 0.1)"""
    z_loss: Annotated[float, Range(0)] = 0.0
    """weight in the loss of the squared log of the softmax denominator, which keeps logits near 0
    ("PaLM", Chowdhery et al., 2022: 1e-4); never part of reported nats"""
    spike_action: Literal["off", "warn", "skip", "rollback"] = "warn"
    """what to do when the loss jumps: off (nothing), warn, skip (the update), or rollback (to the
    last scheduled checkpoint, and skip the data after it)"""
    spike_threshold: Annotated[float, Range(gt=0)] = 6.0
    """a loss is a jump if it is this number of standard deviations above the trend of the last 64
    steps"""
    init_from: str | None = None
    """MODEL from whose weights training starts; its architecture and tokenizer are used"""
    teacher: str | None = None
    """MODEL with the same tokenizer whose distribution over the next token is part of the target
    ("Distilling the Knowledge in a Neural Network", Hinton et al., 2015); its tokenizer is used"""
    teacher_weight: Annotated[float, Range(gt=0, le=1)] = 0.5
    """fraction of the target that is the teacher's distribution; never part of reported nats"""
    threads: Annotated[int | None, Range(1, 4096)] = None
    """CPU threads of each process; empty: OMP_NUM_THREADS, or one for each core"""


def filled(value: Value | None) -> Value:
    """The value of a field that `resolve` has filled."""
    assert value is not None
    return value


def batch_errors(
    batch_tokens: int, *, context_length: int, micro_batch_rows: int | None
) -> Iterator[FieldError]:
    """Yield what is wrong with a batch that is not full windows, or smaller than a micro-batch."""
    rows, remainder = divmod(batch_tokens, context_length)
    if remainder:
        larger = f"{(rows + 1) * context_length:,}"
        nearest = f"{rows * context_length:,} or {larger}" if rows else larger
        yield (
            "train.batch_tokens model.context_length",
            f"train.batch_tokens {batch_tokens:,} is not a multiple of model.context_length "
            f"{context_length:,}; the nearest multiples are: {nearest}",
        )
    elif micro_batch_rows is not None and micro_batch_rows > rows:
        yield (
            "train.micro_batch_rows train.batch_tokens model.context_length",
            f"train.micro_batch_rows is {micro_batch_rows}; it must be in [1, {rows}], the number "
            "of windows of a batch",
        )
