"""The section `parallel` of a config: the number of processes, and what each mesh axis is for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pretrain.model.config import ModelConfig
from pretrain.validation import Checked, FieldError, Range, raise_errors

ActivationCheckpointing = Literal["none", "selective", "full"]
_SIZE = Range(1, 1 << 20)
_AXES = ("data", "shard", "context", "tensor", "pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig(Checked):
    """The section `parallel`."""

    section = "parallel"

    processes: Annotated[int, _SIZE] = 1
    """processes to start on this machine; under torchrun, the number that it has started"""
    data: Annotated[int | None, _SIZE] = None
    """copies of the model, each with its own rows of a batch (data parallel); empty: the number of
    processes divided by the other axes"""
    shard: Annotated[int, _SIZE] = 1
    """processes over which the weights of one copy are sharded, each with its own rows (FSDP)"""
    tensor: Annotated[int, _SIZE] = 1
    """processes over which heads, feed-forward columns and vocabulary are sharded, with the same
    rows (tensor parallel)"""
    context: Annotated[int, _SIZE] = 1
    """processes over which each window is split; the weights are sharded over these processes too
    (context parallel)"""
    pipeline: Annotated[int, _SIZE] = 1
    """processes that each have some of the layers and pass micro-batches on (pipeline
    parallel)"""
    activation_checkpointing: ActivationCheckpointing = "none"
    """activations that are recomputed in the backward pass, not stored: none; all of a block
    (full); or all but the results of matrix products and attention (selective)"""
    elastic: bool = False
    """sum gradients in an order that does not depend on the number of processes, so that a run has
    the same bits with any number of processes (data axis only)"""
    timeout_seconds: Annotated[float, Range(gt=0, le=1 << 20)] = 600.0
    """time to wait for a process that does not answer before it is reported and the run ends"""

    def conflicts(self) -> Iterator[FieldError]:
        for name in _AXES[1:]:
            size = getattr(self, name)
            if self.elastic and size > 1:
                message = f"parallel.{name} is {size}; it must be 1 with parallel.elastic"
                yield f"elastic {name}", message
        if self.context > 1 and self.pipeline > 1:
            yield (
                "context pipeline",
                f"parallel.pipeline is {self.pipeline}; it must be 1 with parallel.context "
                f"{self.context}",
            )
        if self.processes > 1:
            yield from self._axes_errors(self.processes)

    @property
    def shards_weights(self) -> bool:
        """Whether a process has only a part of the weights."""
        return self._processes_of_a_copy > 1

    @property
    def _processes_of_a_copy(self) -> int:
        return self.shard * self.context * self.tensor * self.pipeline

    @property
    def uses_fsdp(self) -> bool:
        """Whether FSDP gathers weights. The axes must be resolved."""
        assert self.data is not None
        return self.shards_weights and self.data * self.shard * self.context > 1

    def batch_part(self, rank: int, *, evaluation: bool = False) -> tuple[int, int]:
        """Return which part of a batch a process reads, and the number of parts.

        Processes of one tensor and pipeline axis read the same, and in training those of a context
        axis, over which only an `evaluation` does not split windows. The axes must be resolved.
        """
        assert self.data is not None
        n_parts, n_same = self.data * self.shard, self.tensor
        if evaluation:
            n_parts *= self.context
        else:
            n_same *= self.context
        return rank // n_same % n_parts, n_parts

    def reports_loss(self, rank: int) -> bool:
        """Whether the losses of a process are added up, of those that evaluate the same part: the
        first of a tensor axis, and the last of a pipeline."""
        n_stage = self.processes // self.pipeline
        return rank % self.tensor == 0 and rank >= self.processes - n_stage

    def _axes_errors(self, n_processes: int) -> Iterator[FieldError]:
        axes = {name: getattr(self, name) for name in _AXES}
        axes["data"] = self.data or max(1, n_processes // self._processes_of_a_copy)
        n = math.prod(axes.values())
        if n != n_processes:
            shown = {k: v for k, v in axes.items() if v > 1 or k in ("data", "shard")}
            product = " x ".join(f"parallel.{name} {size}" for name, size in shown.items())
            yield (
                " ".join(["processes", *axes]),
                f"{product} is {n}, and there are {n_processes} processes; the product of the axes "
                "must be that number",
            )

    def model_errors(self, model: ModelConfig) -> Iterator[FieldError]:
        """Yield the sizes of a model that the axes do not divide."""
        if self.pipeline > model.n_layers:
            yield (
                "parallel.pipeline model.n_layers",
                f"parallel.pipeline is {self.pipeline}; it must be at most model.n_layers, "
                f"{model.n_layers}",
            )
        sizes = (
            ("tensor", "n_heads", model.n_heads),
            ("tensor", "n_kv_heads", model.kv_heads),
            ("tensor", "d_ff", model.feed_forward_width),
            ("context", "context_length", model.context_length or 0),
        )
        for axis, name, size in sizes:
            n = getattr(self, axis)
            if size % n:
                yield (
                    f"parallel.{axis} model.{name}",
                    f"model.{name} is {size:,}; it must be a multiple of parallel.{axis}, {n}",
                )

    def resolve(self, n_processes: int) -> ParallelConfig:
        """Return the same with every axis set for a number of processes; ConfigError if the axes
        do not multiply to it."""
        raise_errors(self._axes_errors(n_processes))
        data = n_processes // self._processes_of_a_copy
        return replace(self, processes=n_processes, data=data)
