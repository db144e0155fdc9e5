"""The optimizer's and the schedule's settings, checked before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_MOST_STEPS = 10**10
ScheduleName = Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """the update rule: adamw, or muon for hidden matrices and adamw for the rest"""
    learning_rate: float = 3e-3
    """peak learning rate"""
    embedding_lr_mult: float = 1.0
    """rate of the token embedding beside muon's matrices, as a multiple of learning_rate; n-gram
    tables take four times that"""
    head_lr_mult: float = 1.0
    """rate of the head beside muon's matrices, as a multiple of learning_rate"""
    base_width: int | None = None
    """the width (model.d_model) that these rates were found at: at another one the head and hidden
    matrices take others, so that the best ones stay the best; empty: as they are at any width"""
    base_batch_tokens: int | None = None
    """the train.batch_tokens that these rates were found at: a larger batch takes higher ones, by
    the root; empty: as they are with any batch"""
    momentum: float = 0.95
    """muon's memory of the gradient"""
    weight_decay: float = 0.1
    """decoupled decay of matrices; norms and biases are never decayed"""
    beta1: float = 0.9
    """AdamW's memory of the gradient"""
    beta2: float = 0.95
    """AdamW's memory of the squared gradient"""
    epsilon: float = 1e-8
    """AdamW's guard against division by zero"""
    clip: float = 1.0
    """largest norm of the whole gradient; 0 switches clipping off"""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            yield (
                "learning_rate",
                f"optimizer.learning_rate is {self.learning_rate}; it must be a number above 0",
            )
        for name in ("weight_decay", "clip", "embedding_lr_mult", "head_lr_mult"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                yield name, f"optimizer.{name} is {value}; it must be 0 or above"
        for name, most in (("base_width", 1 << 20), ("base_batch_tokens", 1 << 30)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                yield name, f"optimizer.{name} is {value}; it must be in [1, {most:,}]"
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                yield name, f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)"
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            yield "epsilon", f"optimizer.epsilon is {self.epsilon}; it must be above 0"

    def width_scale(self, width: int | None) -> float:
        """By how much the rates of hidden matrices and the head are multiplied where a model's
        width is not base_width. ValueError if it is not known and matters.

        What a weight adds to a sum grows with the number of its terms. AdamW's updates are as large
        at any width, so its rates fall with it ("Tensor Programs V", Yang et al., 2022). Muon's
        have a spectral norm that grows with the root of the width ("A Spectral Condition for
        Feature Learning", Yang et al., 2023), and beside it the head, too, does best with a rate
        that falls by that (docs/notebook).
        """
        if self.base_width is None:
            return 1.0
        if width is None:
            raise ValueError("optimizer.base_width is given, but not the width of the model")
        narrower = self.base_width / width
        return math.sqrt(narrower) if self.name == "muon" else narrower

    def batch_scale(self, batch_tokens: int) -> float:
        """By how much all rates are multiplied where a batch is not base_batch_tokens: the root of
        its size, since so much less does the mean of more gradients wander ("On the SDEs and
        Scaling Rules for Adaptive Gradient Algorithms", Malladi et al., 2022; Muon:
        docs/notebook).
        """
        return math.sqrt(batch_tokens / (self.base_batch_tokens or batch_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSegment:
    """Which rates the steps before a change of the schedule were made with: what a run remembers of
    them, so that a step's rate stays a function of the step alone."""

    until_step: int
    """the first step that it no longer holds for"""
    steps: int
    """how many steps the run was to have"""
    learning_rate: float
    name: ScheduleName
    warmup_steps: int
    decay_fraction: float
    final_fraction: float
    origin_step: int = 0
    start_fraction: float = 0.0
    anneal: bool = False

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        if not 0 <= self.origin_step < self.until_step <= self.steps:
            yield (
                "origin_step until_step steps",
                f"schedule.history has a part from step {self.origin_step} until "
                f"{self.until_step} of {self.steps}; these must rise",
            )
        yield from _mistakes_of_shape(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    name: ScheduleName = "wsd"
    """shape after the warm-up; wsd stays at the peak and falls in a straight line at the end"""
    warmup_steps: int | None = None
    """steps in which the rate rises from 0; empty: 2 percent of the steps, at least 10"""
    decay_fraction: float = 0.6
    """share of all steps in which wsd falls"""
    final_fraction: float = 0.0
    """what is left of the peak rate after the last step (cosine, linear, wsd)"""
    origin_step: int = 0
    """written by extend and anneal: the step at which the shape begins"""
    start_fraction: float = 0.0
    """written by extend and anneal: the share of the peak from which it begins"""
    anneal: bool = False
    """written by anneal: a straight line from there to final_fraction, whatever the name"""
    history: tuple[ScheduleSegment, ...] = ()
    """written by extend, anneal and --accept: the schedules of the steps before, oldest first"""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        yield from _mistakes_of_shape(self)
        ends = [part.until_step for part in self.history]
        if ends != sorted(set(ends)):
            yield "history", f"schedule.history has parts until the steps {ends}; these must rise"
        if not self.history and (self.origin_step or self.start_fraction or self.anneal):
            yield (
                "history origin_step start_fraction anneal",
                "schedule.origin_step, schedule.start_fraction and schedule.anneal are written by "
                "pretrain extend and anneal, with schedule.history; a new run has none of them",
            )


def _mistakes_of_shape(schedule: ScheduleConfig | ScheduleSegment) -> Iterator[tuple[str, str]]:
    warmup = schedule.warmup_steps
    if warmup is not None and not 0 <= warmup <= _MOST_STEPS:
        legal = "0 or above" if warmup < 0 else f"at most {_MOST_STEPS:,}"
        yield "warmup_steps", f"schedule.warmup_steps is {warmup}; it must be {legal}"
    for name in ("decay_fraction", "final_fraction"):
        if not 0 <= getattr(schedule, name) <= 1:
            yield name, f"schedule.{name} is {getattr(schedule, name)}; it must be in [0, 1]"
    if not (math.isfinite(schedule.start_fraction) and schedule.start_fraction >= 0):
        yield (
            "start_fraction",
            f"schedule.start_fraction is {schedule.start_fraction}; it must be 0 or above",
        )
