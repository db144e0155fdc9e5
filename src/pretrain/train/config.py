"""Settings of the training loop, checked before torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]
SpikeAction = Literal["off", "warn", "skip", "rollback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    steps: int | None = None
    """updates to make; empty: as many as fit into train.minutes"""
    minutes: float | None = None
    """wall-clock time to train for, turned into a number of steps once, by a timed calibration at
    the start"""
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
    """arithmetic of matrix products; auto takes bf16 where a GPU has it, else fp32"""
    compile: Compile = "auto"
    """compile the decoder with torch.compile; auto does on cuda, where the warm-up pays"""
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
    """standard deviations above the mean of the last 128 steps that make a loss a jump"""
    init_from: str | None = None
    """MODEL whose weights training starts from; its architecture and tokenizer come with it"""
    threads: int | None = None
    """CPU threads of each process; empty: one for each core"""

    def __post_init__(self) -> None:
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
            if value is not None and value < 1:
                raise ValueError(f"train.{name} is {value}; it must be at least 1")
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ValueError(f"train.minutes is {self.minutes}; it must be above 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"train.label_smoothing is {self.label_smoothing}; it must be in [0, 1)"
            )
        if self.keep_checkpoints < 2:
            raise ValueError(
                f"train.keep_checkpoints is {self.keep_checkpoints}; it must be at least 2: one to "
                "go back to when a disk damages the other"
            )
        if not (math.isfinite(self.z_loss) and self.z_loss >= 0):
            raise ValueError(f"train.z_loss is {self.z_loss}; it must be 0 or above")
        if not self.spike_threshold > 0:
            raise ValueError(f"train.spike_threshold is {self.spike_threshold}; it must be above 0")
        if self.seed < 0:
            raise ValueError(f"train.seed is {self.seed}; it must be 0 or above")
