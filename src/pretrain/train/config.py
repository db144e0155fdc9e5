"""Settings of the training loop, checked before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]
SpikeAction = Literal["off", "warn", "skip", "rollback"]
# Nobody means more: 10**10 for counts that are not named here.
_MOST = {"threads": 4096, "minutes": 10_000_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    steps: int | None = None
    """updates to make; empty: as many as fit into train.minutes"""
    minutes: float | None = None
    """wall-clock time to train for, turned into a number of steps once, by a timed calibration at
    the start; with n-gram tables (model.ngram_rows) no more than one reading of the text, or 300"""
    batch_tokens: int | None = None
    """targets in one update, over all processes; empty: 8,192, rounded to whole windows"""
    micro_batch_rows: int | None = None
    """windows that go through the model at once; empty: chosen for the device; never changes a
    result"""
    evaluate_every: int | None = None
    """steps between evaluations on held-out text; empty: a tenth of the run"""
    evaluate_tokens: int = 16_384
    """held-out targets of an evaluation during training, always the same; the last one takes the
    whole split"""
    save_every: int | None = None
    """steps between checkpoints; empty: at every evaluation"""
    keep_checkpoints: int = 2
    """newest checkpoints that are kept, at least 2, besides the best by validation"""
    keep_every: int | None = None
    """keep the checkpoints of every so many steps for good; empty: none but the newest and best"""
    patience: int | None = None
    """stop after this many evaluations in a row without a new best; empty: never"""
    seed: int = 1
    """where initial weights, the order of the data and dropout come from"""
    device: Device = "auto"
    """where to compute; auto takes cuda, then mps, then cpu"""
    precision: Precision = "auto"
    """arithmetic of matrix products; auto takes bf16 where a GPU has it, or a CPU that trains for
    minutes instead of steps, else fp32"""
    compile: Compile = "auto"
    """compile decoder and loss with torch.compile; auto does on cuda, where the warm-up pays"""
    deterministic: bool = False
    """refuse GPU kernels whose result varies from run to run (CPU runs never use any)"""
    label_smoothing: float = 0.0
    """share of each target's probability that is spread over the vocabulary (Vaswani et al., 2017:
    0.1)"""
    z_loss: float = 0.0
    """weight of the squared log of the softmax's sum in the objective, which keeps logits near 0
    ("PaLM", Chowdhery et al., 2022: 1e-4); never part of reported nats"""
    spike_action: SpikeAction = "warn"
    """what a jump of the loss does: off, warn, skip (the update), or rollback (to the last
    checkpoint that was due, passing over the data since)"""
    spike_threshold: float = 6.0
    """standard deviations above where the last 64 steps point to that make a loss a jump"""
    init_from: str | None = None
    """MODEL whose weights training starts from; its architecture and tokenizer come with it"""
    threads: int | None = None
    """CPU threads of each process; empty: one for each core"""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        for name in (
            "steps",
            "batch_tokens",
            "micro_batch_rows",
            "evaluate_every",
            "evaluate_tokens",
            "save_every",
            "keep_checkpoints",
            "keep_every",
            "patience",
            "threads",
        ):
            value = getattr(self, name)
            most = _MOST.get(name, 10**10)
            if value is not None and not 1 <= value <= most:
                legal = "at least 1" if value < 1 else f"at most {most:,}"
                yield name, f"train.{name} is {value}; it must be {legal}"
        if self.minutes is not None and not 0 < self.minutes <= _MOST["minutes"]:
            legal = f"at most {_MOST['minutes']:,}" if self.minutes > 0 else "above 0"
            yield "minutes", f"train.minutes is {self.minutes}; it must be {legal}"
        if not 0 <= self.label_smoothing < 1:
            yield (
                "label_smoothing",
                f"train.label_smoothing is {self.label_smoothing}; it must be in [0, 1)",
            )
        if self.keep_checkpoints == 1:
            yield (
                "keep_checkpoints",
                "train.keep_checkpoints is 1; it must be at least 2: one to go back to when a disk "
                "damages the other",
            )
        if not (math.isfinite(self.z_loss) and self.z_loss >= 0):
            yield "z_loss", f"train.z_loss is {self.z_loss}; it must be 0 or above"
        if not self.spike_threshold > 0:
            yield (
                "spike_threshold",
                f"train.spike_threshold is {self.spike_threshold}; it must be above 0",
            )
        if not 0 <= self.seed < 1 << 63:
            legal = "0 or above" if self.seed < 0 else "below 2**63"
            yield "seed", f"train.seed is {self.seed}; it must be {legal}"


def mistakes_of_batch(
    batch_tokens: int, *, context_length: int, micro_batch_rows: int | None
) -> Iterator[tuple[str, str]]:
    """What is wrong with a batch that is not whole windows, or with micro-batches that are larger:
    the fields that it hangs on, and a sentence."""
    rows, rest = divmod(batch_tokens, context_length)
    if rest:
        near = f"{rows * context_length:,} or " if rows else ""
        yield (
            "train.batch_tokens model.context_length",
            f"train.batch_tokens {batch_tokens:,} is not a multiple of model.context_length "
            f"{context_length:,}; the nearest that are: {near}{(rows + 1) * context_length:,}",
        )
    elif micro_batch_rows is not None and micro_batch_rows > rows:
        yield (
            "train.micro_batch_rows train.batch_tokens model.context_length",
            f"train.micro_batch_rows {micro_batch_rows} is more than the {rows} windows of a "
            f"batch; legal: 1 to {rows}",
        )
