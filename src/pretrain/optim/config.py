"""The sections `optimizer` and `schedule` of a config."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pretrain.validation import Checked, FieldError, Range

ScheduleName = Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"]
_FRACTION = Range(0, 1)
_STEPS = Range(0, 10**10)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig(Checked):
    """The section `optimizer`."""

    section = "optimizer"

    name: Literal["adamw", "muon"] = "adamw"
    """the update rule: adamw, or muon for hidden matrices and adamw for the rest"""
    learning_rate: Annotated[float, Range(gt=0)] = 3e-3
    """peak learning rate"""
    embedding_lr_mult: Annotated[float, Range(0)] = 1.0
    """with muon, learning rate of the token embedding as a multiple of learning_rate; n-gram tables
    have four times that"""
    head_lr_mult: Annotated[float, Range(0)] = 1.0
    """with muon, learning rate of the output head as a multiple of learning_rate"""
    base_width: Annotated[int | None, Range(1, 1 << 20)] = None
    """width (model.d_model) at which these learning rates were tuned: at another width those of
    head and hidden matrices are scaled, so that they stay optimal; empty: never scaled"""
    base_batch_tokens: Annotated[int | None, Range(1, 1 << 30)] = None
    """train.batch_tokens at which these learning rates were tuned: for another batch size they are
    scaled by the root of the ratio; empty: never scaled"""
    momentum: Annotated[float, Range(0, lt=1)] = 0.95
    """muon's decay rate of the mean gradient"""
    row_norm: bool = False
    """with muon, give all rows of a mean gradient the same length before it is orthogonalized
    ("MuonEq", Chang et al., 2026)"""
    weight_decay: Annotated[float, Range(0)] = 0.1
    """decoupled weight decay of matrices; norms and biases are never decayed"""
    beta1: Annotated[float, Range(0, lt=1)] = 0.9
    """AdamW's decay rate of the mean gradient"""
    beta2: Annotated[float, Range(0, lt=1)] = 0.95
    """AdamW's decay rate of the mean squared gradient"""
    epsilon: Annotated[float, Range(gt=0)] = 1e-8
    """AdamW's constant against division by zero"""
    clip: Annotated[float, Range(0)] = 1.0
    """maximum norm of the full gradient; 0 switches clipping off"""

    def width_scale(self, width: int | None) -> float:
        """Return the factor on learning rates of hidden matrices and head at a width other than
        base_width. ValueError if base_width is given and the width is not.

        A layer's output is a sum over its input width. AdamW's updates have the same size at any
        width, so the learning rate falls with 1/width ("Tensor Programs V", Yang et al., 2022).
        Muon's have a spectral norm that grows with the root of the width ("A Spectral Condition
        for Feature Learning", Yang et al., 2023); with Muon, the head does best with a learning
        rate that falls by the root, too (docs/notebook).
        """
        if self.base_width is None:
            return 1.0
        if width is None:
            raise ValueError(f"the model's width must be given with base_width {self.base_width}")
        ratio = self.base_width / width
        return math.sqrt(ratio) if self.name == "muon" else ratio

    def batch_scale(self, batch_tokens: int) -> float:
        """Return the factor on all learning rates for a batch other than base_batch_tokens.

        It is the root of the ratio: the noise of the mean gradient falls by it ("On the SDEs and
        Scaling Rules for Adaptive Gradient Algorithms", Malladi et al., 2022; Muon: docs/notebook).
        """
        return math.sqrt(batch_tokens / (self.base_batch_tokens or batch_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSegment(Checked):
    """The schedule of the steps before it was changed: a run keeps it, so that the learning rate
    stays a function of the step alone."""

    section = "schedule.history"

    until_step: Annotated[int, _STEPS]
    """the first step after this segment"""
    steps: Annotated[int, _STEPS]
    """number of steps that the run was planned for"""
    learning_rate: Annotated[float, Range(gt=0)]
    name: ScheduleName
    warmup_steps: Annotated[int, _STEPS]
    decay_fraction: Annotated[float, _FRACTION]
    final_fraction: Annotated[float, _FRACTION]
    origin_step: Annotated[int, _STEPS] = 0
    start_fraction: Annotated[float, Range(0)] = 0.0
    anneal: bool = False

    def conflicts(self) -> Iterator[FieldError]:
        if not self.origin_step < self.until_step <= self.steps:
            yield (
                "origin_step until_step steps",
                f"schedule.history has a segment from step {self.origin_step} to step "
                f"{self.until_step} of {self.steps}; these must increase",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig(Checked):
    """The section `schedule`."""

    section = "schedule"

    name: ScheduleName = "wsd"
    """shape after the warm-up; wsd stays at the peak and falls linearly at the end"""
    warmup_steps: Annotated[int | None, _STEPS] = None
    """steps in which the learning rate rises from 0; empty: 2 percent of the steps, at least 10"""
    decay_fraction: Annotated[float, _FRACTION] = 0.6
    """fraction of all steps in which the learning rate of wsd falls"""
    final_fraction: Annotated[float, _FRACTION] = 0.0
    """learning rate after the last step, as a fraction of the peak (cosine, linear, wsd)"""
    origin_step: Annotated[int, _STEPS] = 0
    """written by extend and anneal: the step at which the shape begins"""
    start_fraction: Annotated[float, Range(0)] = 0.0
    """written by extend and anneal: the fraction of the peak at which the shape begins"""
    anneal: bool = False
    """written by anneal: fall linearly from start_fraction to final_fraction, whatever the name"""
    history: tuple[ScheduleSegment, ...] = ()
    """written by extend, anneal and --accept: the schedules of the earlier steps, oldest first"""

    def conflicts(self) -> Iterator[FieldError]:
        ends = [segment.until_step for segment in self.history]
        if ends != sorted(set(ends)):
            yield (
                "history",
                f"schedule.history has segments to the steps {ends}; these must increase",
            )
        if not self.history and (self.origin_step or self.start_fraction or self.anneal):
            yield (
                "history origin_step start_fraction anneal",
                "schedule.origin_step, schedule.start_fraction and schedule.anneal are written by "
                "pretrain extend and anneal, with schedule.history; leave them out",
            )
