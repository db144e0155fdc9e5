"""A model whose weights are laid over processes, by FSDP2, along the tensor axis, or both."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from pretrain.optimizer.grouped import gradient_values
from pretrain.optimizer.muon import Matrices
from pretrain.parallel.context import PartOfNoise, Stretches
from pretrain.parallel.model import Parallel
from pretrain.parallel.muon import SharedMatrices
from pretrain.parallel.shards import Map


@dataclass(frozen=True, slots=True)
class Meshes:
    """The processes, arranged as each of their tasks needs it."""

    laid: DeviceMesh
    """axes data, laid (shard x context: weights are laid over both) and tensor"""
    context: dist.ProcessGroup
    """those that share a window"""
    holders: dist.ProcessGroup
    """those that hold a copy of the model together"""

    @property
    def stretch(self) -> tuple[int, int]:
        """The number of this process's stretch of a window, and how many there are."""
        return dist.get_rank(self.context), dist.get_world_size(self.context)

    @property
    def heads(self) -> tuple[int, int]:
        tensor = self.laid["tensor"]
        return tensor.get_local_rank(), tensor.size()


@dataclass(slots=True)
class Sharded(Parallel):
    """Each process holds a box of each parameter, and knows who holds the others."""

    meshes: Meshes | None = None
    boxes: Map = field(init=False)
    _stretch_tokens: int = 0
    """those of each window that this process reads at the moment, where it does not read all"""

    def __post_init__(self) -> None:
        Parallel.__post_init__(self)
        self.boxes = Map(self.parts, self.world)
        self.objective.decoder.register_forward_pre_hook(self._part_of_window, with_kwargs=True)

    def saves(self, name: str) -> bool:
        return self.boxes.is_first(name)

    @property
    def matrices(self) -> Matrices:
        assert self.meshes is not None
        return SharedMatrices(self.parts, self.boxes, self.meshes.holders)

    def let_go(self) -> None:
        """What an evaluation has gathered stands in the place of this process's own: it keeps other
        weights from being read, and gradients from being forgotten."""
        if isinstance(self.objective.decoder, FSDPModule):
            self.objective.decoder.reshard()

    def _summing(self, is_last: bool) -> AbstractContextManager[Any]:
        assert self.meshes is not None
        decoder = self.objective.decoder
        if isinstance(decoder, FSDPModule) and self.meshes.laid["data"].size() > 1:
            decoder.set_requires_all_reduce(is_last)
        return nullcontext()

    def _called(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Nats and count of this process's stretch of each window."""
        assert self.meshes is not None
        number, n = self.meshes.stretch
        if n == 1:
            return self.module(batch)
        T = batch.inputs.shape[1] // n
        own = slice(number * T, (number + 1) * T)
        self._stretch_tokens = T
        try:
            return self.module(
                batch._replace(inputs=batch.inputs[:, own], targets=batch.targets[:, own])
            )
        finally:
            self._stretch_tokens = 0

    def _part_of_window(
        self, decoder: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a decoder is told that reads a stretch, or has some heads, of what others have."""
        assert self.meshes is not None
        is_cut, noise = bool(self._stretch_tokens), named.get("noise")
        if is_cut:
            named["cache"] = Stretches(self.meshes.context, self._stretch_tokens)
        if noise is not None:
            stretch = self.meshes.stretch if is_cut else (0, 1)
            named["noise"] = PartOfNoise(
                noise.seed, noise.samples_B, stretch=stretch, heads=self.meshes.heads
            )
        return given, named

    def _squares(self) -> dict[str, float]:
        mine = Parallel._squares(self)
        shares = [square / len(self.boxes.holders(name)) for name, square in mine.items()]
        return dict(zip(mine, self.world.total(*shares), strict=True))

    def clip(self, limit: float) -> float:
        norm = math.sqrt(sum(self._squares().values()))
        if limit and math.isfinite(norm) and norm > limit:
            for values in gradient_values(p for _, p in self.named_parameters()):
                values.mul_(limit / norm)
        return norm
