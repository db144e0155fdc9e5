"""The optimizer's and the schedule's settings, checked before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_MOST_STEPS = 10**10


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """the update rule: adamw, or muon for hidden matrices and adamw for the rest"""
    learning_rate: float = 3e-3
    """peak learning rate"""
    embedding_rate: float = 1.0
    """rate of the token embedding beside muon's matrices, as a multiple of learning_rate; n-gram
    tables take twice that"""
    head_rate: float = 1.0
    """rate of the head beside muon's matrices, as a multiple of learning_rate"""
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
        for name in ("weight_decay", "clip", "embedding_rate", "head_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                yield name, f"optimizer.{name} is {value}; it must be 0 or above"
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                yield name, f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)"
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            yield "epsilon", f"optimizer.epsilon is {self.epsilon}; it must be above 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    name: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = "wsd"
    """shape after the warm-up; wsd stays at the peak and falls in a straight line at the end"""
    warmup_steps: int | None = None
    """steps in which the rate rises from 0; empty: 2 percent of the steps, at least 10"""
    decay_fraction: float = 0.6
    """share of all steps in which wsd falls"""
    final_fraction: float = 0.0
    """what is left of the peak rate after the last step (cosine, linear, wsd)"""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        warmup = self.warmup_steps
        if warmup is not None and not 0 <= warmup <= _MOST_STEPS:
            legal = "0 or above" if warmup < 0 else f"at most {_MOST_STEPS:,}"
            yield "warmup_steps", f"schedule.warmup_steps is {warmup}; it must be {legal}"
        for name in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                yield name, f"schedule.{name} is {getattr(self, name)}; it must be in [0, 1]"
