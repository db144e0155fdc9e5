"""A model over several processes, as a step of training sees it in one of them.

Micro-batches come in; gradients of nats, summed over all processes, are left on the parameters that
this process updates: whole ones, or its rows. In one process it is the objective itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.distributed import World
from pretrain.model import LMLoss
from pretrain.model.decoder import initial_value
from pretrain.model.loss import Batch
from pretrain.optim.muon import Orthogonalizer
from pretrain.optim.param_groups import clip_gradients, gradient_values
from pretrain.parallel.rows import mean_rows_
from pretrain.parallel.shards import LocalShard, ShardSlice, cut, full_shard


@dataclass(slots=True)
class ParallelModel:
    """An objective, and this process's share of it."""

    lm_loss: LMLoss
    world: World
    module: Callable[[Batch], tuple[Tensor, Tensor]] = None  # type: ignore[assignment]
    """what is called, if it is not the loss module itself: its wrapper, which sums gradients"""
    model_parallel_size: int = 1
    """processes that have the same rows, and parts of a model"""
    n_loss_ranks: int = 1
    """of them, those that come to the nats"""
    tables: list[nn.Parameter] = field(default_factory=list)
    """those of which a step names the rows that it has read"""
    compute_dtype: str = "fp32"
    """the precision in which weights come that a pass reads, and so that of its products"""
    shards: dict[str, LocalShard] = field(default_factory=dict)
    """what this process holds, by the decoder's names"""

    forward_seconds: float = 0.0
    """in which this process went forward in the last step"""

    def __post_init__(self) -> None:
        if self.module is None:
            self.module = self.lm_loss
        if not self.shards:
            named = self.lm_loss.decoder.named_parameters()
            self.shards = {name: full_shard(parameter) for name, parameter in named}

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What this process updates: whole parameters, or its rows of them, if it has any."""
        return [(name, p) for name, p in self.local_parameters() if p.numel()]

    def local_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The same with those of which it has no row: an optimizer of whole matrices may need its
        hand all the same."""
        return [(name, part.local) for name, part in self.shards.items()]

    def is_saver(self, name: str, *, is_full: bool = False) -> bool:
        """Whether it is this process that saves its part of a parameter, or what `is_full` beside
        it, as a count of steps is."""
        return self.world.is_main

    @property
    def eval_shard(self) -> tuple[int, int]:
        """Which of how many parts of a text this process evaluates; some may have the same one."""
        return self.world.rank, self.world.size

    @property
    def owns_loss(self) -> bool:
        """Whether what this process finds counts, and not what another finds of the same part."""
        return True

    def shard_of(self, name: str, n_dims: int) -> tuple[tuple[int, ...], ShardSlice] | None:
        """The whole shape of a parameter, or of an optimizer's memory of so many dims beside it,
        and the box of it that this process holds; None where that is all of it."""
        part = self.shards[name]
        if part.local is part.parameter or not n_dims:
            return None
        return tuple(part.shape[:n_dims]), part.bounds[:n_dims]

    @property
    def orthogonalizer(self) -> Orthogonalizer:
        """For an optimizer whose rule is one of whole matrices."""
        return Orthogonalizer()

    def forward_backward(self, batches: Iterable[Any], precision: str) -> tuple[float, int]:
        """Gradients of all micro-batches, as the mean of the processes' sums; returns the nats and
        the count of all processes."""
        self.forward_seconds = 0.0
        self.reshard()
        self.lm_loss.zero_grad(set_to_none=True)
        nats, count = self._pass(batches, precision)
        for part in self.shards.values():
            part.localize_grad()
        self._sum_ends()
        for width in sorted({table.shape[1] for table in self.tables}):
            mean_rows_([t for t in self.tables if t.shape[1] == width], self.world.size)
        # Read once a step: a look at each micro-batch would make a GPU wait.
        if self.world.size > 1:
            nats, count = self.world.all_reduce_(torch.stack([nats.double(), count.double()]))
        return float(nats) / self.n_loss_ranks, int(count) // self.n_loss_ranks

    def _pass(self, batches: Iterable[Any], precision: str) -> tuple[Tensor, Tensor]:
        """Forward and back with all micro-batches; this process's nats and count."""
        all_nats, all_counts = [], []
        for batch, is_last in with_last(batches):
            with self._summing(is_last):
                began = time.perf_counter()
                with self.world.autocast(precision):
                    batch_nats, batch_count = self._called(batch.to(self.world.device))
                self.forward_seconds += time.perf_counter() - began
                batch_nats.backward()  # type: ignore[no-untyped-call]
            all_nats.append(batch_nats.detach())
            all_counts.append(batch_count)
        return torch.stack(all_nats).sum(), torch.stack(all_counts).sum()

    def _sum_ends(self) -> None:
        """Make one gradient of those of a parameter that is in two places of a pipeline."""

    def _called(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.module(batch)

    def _summing(self, is_last: bool) -> AbstractContextManager[Any]:
        """Sum gradients over copies after the last micro-batch only."""
        if isinstance(self.module, DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return nullcontext()

    @property
    def grad_divisor(self) -> int:
        """Of how many sums `backward` leaves the mean."""
        return self.world.size // self.model_parallel_size

    def unshard(self) -> None:
        """Have the weights at hand that are not read within the decoder's own call: embedding and
        head, where they are laid over processes."""

    def reshard(self) -> None:
        """Let go of them."""

    def clip(self, limit: float) -> float:
        """Scale the gradients to a joint norm of at most `limit` (0: no limit); returns the norm
        before."""
        return clip_gradients((p for _, p in self.named_parameters()), max_norm=limit)

    def gradient_norms(self) -> dict[str, float]:
        """The norm of each parameter's gradient, of all processes; all of them call this."""
        return {name: math.sqrt(square) for name, square in self._squares().items()}

    def _squares(self) -> dict[str, float]:
        """The squared norm of each gradient."""
        norms = {
            name: torch.linalg.vector_norm(values, dtype=torch.float64)
            for name, part in self.shards.items()
            for values in gradient_values([part.local])
        }
        # Read at once: each look makes a GPU wait.
        read = torch.stack(list(norms.values())).square().tolist() if norms else []
        return dict.fromkeys(self.shards, 0.0) | dict(zip(norms, read, strict=True))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Give each parameter that this process holds its values at the start of training."""
        decoder = self.lm_loss.decoder
        for name, part in self.shards.items():
            # All columns of its rows, if it has but some: an element's number is its place.
            rows = part.bounds[0] if part.bounds else (0, 1)
            row = math.prod(part.shape[1:])
            values = initial_value(
                decoder.config,
                name,
                part.shape,
                rows[0] * row,
                rows[1] * row,
                seed=seed,
                device=self.world.device,
            ).view(rows[1] - rows[0], *part.shape[1:])
            part.local.copy_(cut(values, ((0, rows[1] - rows[0]), *part.bounds[1:])))


def with_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each item, and whether it is the last."""
    walk = iter(items)
    for held in walk:
        for following in walk:
            yield held, False
            held = following
        yield held, True
