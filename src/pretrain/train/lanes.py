"""Micro-batches of a step side by side: one thread and one share of the cores for each.

Torch splits every operator over all cores and waits for the slowest, hundreds of times a step; for
small models on a CPU that wait is a large part of the time. A lane works through whole
micro-batches on its own instead, with a replica of the objective that shares the weights and has
its own gradients. They are summed in the order of the lanes, so no number hangs on which was
faster.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from pretrain.data.batches import MicroBatch
from pretrain.world import World

# Each lane holds a whole gradient: more of them would cost more memory than they save time.
MOST_LANES = 8


def accumulate(
    objective: nn.Module, micro_batches: Sequence[MicroBatch], *, world: World, precision: str
) -> list[tuple[Tensor, Tensor]]:
    """Add the gradients of some micro-batches to the objective's; returns (nats, count) of each."""
    sums = []
    for batch in micro_batches:
        with world.autocast(precision):
            nats, count = objective(batch.to(world.device))
        nats.backward()
        sums.append((nats.detach(), count))
    return sums


class Lanes:
    """Gradients of a step's micro-batches, from as many threads as pay; a context that ends them.

    There is one lane, which is no thread at all, on a GPU and for `side_by_side` False.
    """

    def __init__(self, objective: nn.Module, *, world: World, side_by_side: bool = True) -> None:
        self.objective, self.world = objective, world
        self.most = min(world.threads, MOST_LANES)
        if not side_by_side or world.device.type != "cpu":
            self.most = 1
        self._replicas: list[nn.Module] = []
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def accumulate(
        self, micro_batches: Sequence[MicroBatch], *, precision: str
    ) -> list[tuple[Tensor, Tensor]]:
        """As `accumulate`, with micro-batch i in lane i mod n."""
        n = min(self.most, len(micro_batches))
        if n == 1:
            return accumulate(self.objective, micro_batches, world=self.world, precision=precision)
        if self._pool is None:
            self._open(n)
        assert self._pool is not None
        lanes = [
            self._pool.submit(
                accumulate, replica, micro_batches[i::n], world=self.world, precision=precision
            )
            for i, replica in enumerate(self._replicas[:n])
        ]
        sums = [pair for lane in lanes for pair in lane.result()]
        for replica in self._replicas[:n]:
            _move_gradients(replica, self.objective)
        return sums

    def _open(self, n: int) -> None:
        """Start n threads, each with its share of the cores (a setting of the thread in torch)."""
        started = threading.Barrier(n)
        share = self.world.threads // n

        def begin() -> None:
            # A thread takes the common number at its first look and would do so again after our
            # own: so it looks first.
            torch.get_num_threads()
            torch.set_num_threads(share)
            torch.set_flush_denormal(True)

        self._pool = ThreadPoolExecutor(n, thread_name_prefix="lane", initializer=begin)
        for future in [self._pool.submit(started.wait) for _ in range(n)]:
            future.result()
        # Threads that anybody starts from here on take the number that was set last.
        torch.set_num_threads(self.world.threads)
        for _ in range(n):
            shared = {id(p): nn.Parameter(p.detach()) for p in self.objective.parameters()}
            replica = copy.deepcopy(self.objective, dict[int, object](shared))
            self._replicas.append(replica.train(self.objective.training))


def _move_gradients(source: nn.Module, target: nn.Module) -> None:
    """Add the gradients of one replica to the other's, and leave none behind."""
    for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
        if theirs.grad is not None:
            ours.grad = theirs.grad if ours.grad is None else ours.grad.add_(theirs.grad)
            theirs.grad = None
