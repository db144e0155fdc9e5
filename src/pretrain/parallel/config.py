"""Settings of several processes: how many, and what each axis of the mesh is for. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

ActivationCheckpointing = Literal["none", "selective", "full"]
_MOST = 1 << 20
_AXES = ("data", "shard", "context", "tensor", "pipeline")


class Sizes(Protocol):
    """What axes must divide, of a model's config."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def feed_forward_width(self) -> int: ...
    @property
    def context_length(self) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    processes: int = 1
    """processes to start on this machine; under torchrun there are as many as it has started"""
    data: int | None = None
    """copies of the model, each with its own rows of a batch; empty: as many as the processes
    make"""
    shard: int = 1
    """processes over which the weights of one copy are laid, each with rows of its own (FSDP)"""
    tensor: int = 1
    """processes that share heads, feed-forward columns and vocabulary, and see the same rows"""
    context: int = 1
    """processes that share windows, each with a stretch of every one; weights are laid over them"""
    pipeline: int = 1
    """processes that have some layers each, between which micro-batches are passed on"""
    activation_checkpointing: ActivationCheckpointing = "none"
    """activations that are made again in the backward pass instead of being kept: none, all of a
    block (full), or all but the results of its products and of attention (selective)"""
    elastic: bool = False
    """sum gradients in an order that does not hang on the number of processes, so that a run is the
    same bit for bit on any (data axis alone)"""
    timeout_seconds: float = 600.0
    """how long processes wait for one that does not answer before they name it and end"""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        wrong = False
        for name in ("processes", *_AXES):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST:
                legal = "at least 1" if value < 1 else f"at most {_MOST:,}"
                wrong = True
                yield name, f"parallel.{name} is {value}; it must be {legal}"

        if not 0 < self.timeout_seconds <= _MOST:
            legal = f"at most {_MOST:,}" if self.timeout_seconds > 0 else "above 0"
            yield (
                "timeout_seconds",
                f"parallel.timeout_seconds is {self.timeout_seconds}; it must be {legal}",
            )
        if wrong:
            return
        for name in _AXES[1:]:
            if self.elastic and getattr(self, name) > 1:
                yield (
                    f"elastic {name}",
                    f"parallel.elastic goes with parallel.{name} 1, not {getattr(self, name)}",
                )
        if self.context > 1 and self.pipeline > 1:
            yield (
                "context pipeline",
                f"parallel.context {self.context} goes with parallel.pipeline 1, not "
                f"{self.pipeline}",
            )
        if self.processes > 1:
            yield from self._mistakes_of_axes(self.processes)

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds less than all weights."""
        return self._within_copy > 1

    @property
    def _within_copy(self) -> int:
        return self.shard * self.context * self.tensor * self.pipeline

    def batch_shard(self, rank: int) -> tuple[int, int]:
        """Which of how many parts of a batch a process reads; those of one context, tensor and
        pipeline axis read the same. The axes must be filled."""
        assert self.data is not None
        n = self.data * self.shard
        return rank // (self.context * self.tensor) % n, n

    def _mistakes_of_axes(self, n_processes: int) -> Iterator[tuple[str, str]]:
        data = self.data or max(1, n_processes // self._within_copy)
        axes = {"data": data, **{name: getattr(self, name) for name in _AXES[1:]}}
        if math.prod(axes.values()) != n_processes:
            shown = {name: n for name, n in axes.items() if n > 1 or name in ("data", "shard")}
            product = " x ".join(f"parallel.{name} {n}" for name, n in shown.items())
            yield (
                " ".join(["processes", *axes]),
                f"{product} is {math.prod(axes.values())}, and there are {n_processes} processes; "
                "the product of the axes must be that number",
            )

    def mistakes_of_model(self, model: Sizes) -> Iterator[tuple[str, str]]:
        """What the axes do not divide: the fields that it hangs on, and a sentence."""
        sizes = {
            ("tensor", "n_heads"): model.n_heads,
            ("tensor", "n_kv_heads"): model.kv_heads,
            ("tensor", "d_ff"): model.feed_forward_width,
            ("context", "context_length"): model.context_length or 0,
        }
        if self.pipeline > model.n_layers:
            yield (
                "parallel.pipeline model.n_layers",
                f"parallel.pipeline {self.pipeline} is more than the {model.n_layers} layers of "
                "the model",
            )
        for (axis, name), value in sizes.items():
            n = getattr(self, axis)
            if value % n:
                yield (
                    f"parallel.{axis} model.{name}",
                    f"model.{name} {value:,} is not a multiple of parallel.{axis} {n}, over which "
                    "it is shared",
                )

    def resolve(self, n_processes: int) -> ParallelConfig:
        """The same with every axis filled, for so many processes; ValueError where the axes do not
        multiply to them."""
        for _, mistake in self._mistakes_of_axes(n_processes):
            raise ValueError(mistake)
        data = n_processes // self._within_copy
        return replace(self, processes=n_processes, data=data)
