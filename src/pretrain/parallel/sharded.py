"""A model whose weights are laid over processes, by FSDP2, along the tensor axis, or both."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from pretrain.optim.muon import Orthogonalizer
from pretrain.optim.param_groups import gradient_values
from pretrain.parallel.context import ContextParallelCache, ShardedDropoutRng
from pretrain.parallel.model import ParallelModel
from pretrain.parallel.muon import ShardedOrthogonalizer
from pretrain.parallel.pipeline import Pipe
from pretrain.parallel.shards import ShardLayout


@dataclass(frozen=True, slots=True)
class Meshes:
    """The processes, arranged as each of their tasks needs it."""

    laid: DeviceMesh
    """axes data, laid (shard x context: weights are laid over both) and tensor"""
    context: dist.ProcessGroup
    """those that share a window"""
    holders: dist.ProcessGroup
    """those that hold a copy of the model, or of some layers of it, together"""
    pipeline: dist.ProcessGroup
    """those that have its layers, one after another"""
    ends: dist.ProcessGroup
    """the first and the last of them"""

    @property
    def stretch(self) -> tuple[int, int]:
        """The number of this process's stretch of a window, and how many there are."""
        return dist.get_rank(self.context), dist.get_world_size(self.context)

    @property
    def heads(self) -> tuple[int, int]:
        tensor = self.laid["tensor"]
        return tensor.get_local_rank(), tensor.size()


@dataclass(slots=True)
class Sharded(ParallelModel):
    """Each process holds a box of each parameter, and knows who holds the others."""

    meshes: Meshes | None = None
    pipe: Pipe | None = None
    """this process's layers among others', where there is a pipeline axis"""
    layout: ShardLayout = field(init=False)
    _stretch_tokens: int = 0
    """those of each window that this process reads at the moment, where it does not read all"""

    def __post_init__(self) -> None:
        ParallelModel.__post_init__(self)
        self.layout = ShardLayout(self.shards, self.world)
        self.lm_loss.decoder.register_forward_pre_hook(self._part_of_window, with_kwargs=True)

    def is_saver(self, name: str, *, is_full: bool = False) -> bool:
        return self.layout.is_first(name, of_any_box=is_full)

    @property
    def eval_shard(self) -> tuple[int, int]:
        n = self.world.size // self.model_parallel_size
        return self.world.rank // self._n_tensor % n, n

    @property
    def owns_loss(self) -> bool:
        assert self.meshes is not None
        is_last = self.pipe is None or self.pipe.is_last
        return is_last and self.meshes.heads[0] == 0

    @property
    def _n_tensor(self) -> int:
        assert self.meshes is not None
        return self.meshes.heads[1]

    @property
    def orthogonalizer(self) -> Orthogonalizer:
        assert self.meshes is not None
        return ShardedOrthogonalizer(self.shards, self.layout, self.meshes.holders)

    def unshard(self) -> None:
        if isinstance(self.lm_loss.decoder, FSDPModule):
            self.lm_loss.decoder.unshard()

    def reshard(self) -> None:
        """What an evaluation has gathered stands in the place of this process's own: it keeps other
        weights from being read, and gradients from being forgotten."""
        if isinstance(self.lm_loss.decoder, FSDPModule):
            self.lm_loss.decoder.reshard()

    def _summing(self, is_last: bool) -> AbstractContextManager[Any]:
        assert self.meshes is not None
        decoder = self.lm_loss.decoder
        if isinstance(decoder, FSDPModule) and self.meshes.laid["data"].size() > 1:
            decoder.set_requires_all_reduce(is_last)
        return nullcontext()

    def _sum_ends(self) -> None:
        """Where the embedding is the head, two processes of a pipeline have slopes of it."""
        name = "token_embedding.weight"
        if self.pipe is None or self.lm_loss.decoder.config.tied_head is False:
            return
        if name in self.shards:
            assert self.meshes is not None
            dist.all_reduce(self.shards[name].local.grad, group=self.meshes.ends)

    def _pass(self, batches: Iterable[Any], precision: str) -> tuple[Tensor, Tensor]:
        if self.pipe is None:
            return ParallelModel._pass(self, batches, precision)
        return self.pipe.run(list(batches), self.world, precision)

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
        is_cut, dropout_rng = bool(self._stretch_tokens), named.get("dropout_rng")
        if is_cut:
            named["cache"] = ContextParallelCache(self.meshes.context, self._stretch_tokens)
        if dropout_rng is not None:
            stretch = self.meshes.stretch if is_cut else (0, 1)
            named["dropout_rng"] = ShardedDropoutRng(
                dropout_rng.seed, dropout_rng.samples_B, stretch=stretch, heads=self.meshes.heads
            )
        return given, named

    def _squares(self) -> dict[str, float]:
        mine = ParallelModel._squares(self)
        shares = {name: square / len(self.layout.holders(name)) for name, square in mine.items()}
        totals = self.world.all_sum(*(shares.get(name, 0.0) for name in self.layout.names))
        return dict(zip(self.layout.names, totals, strict=True))

    def clip(self, limit: float) -> float:
        norm = math.sqrt(sum(self._squares().values()))
        if limit and math.isfinite(norm) and norm > limit:
            for values in gradient_values(p for _, p in self.named_parameters()):
                values.mul_(limit / norm)
        return norm
