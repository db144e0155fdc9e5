"""Gradients whose bits do not depend on how many processes made them.

Floating-point sums hang on their order. Here it is that of a tree over the micro-batches of a step,
the same one whoever computes which leaf ("EasyScale", Li et al., 2023, has the aim): each
micro-batch makes a gradient of its own, neighbours are added, then neighbouring sums. A process has
whole branches of the tree; what they came to is gathered, and each process adds the rest itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.parallel.model import ParallelModel

# The gradients of some micro-batches together, a parameter each; None where there is none.
Gradients = list[Tensor | None]


def add(one: Gradients, other: Gradients) -> Gradients:
    """The sum of two branches. That of sparse gradients names each row once, so that a row is added
    up along the same branches as all else."""
    return [_sum(a, b) for a, b in zip(one, other, strict=True)]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return (one + other).coalesce() if one.is_sparse else one + other


@dataclass(frozen=True, slots=True)
class ReductionTree:
    """How `size` processes share the tree over `n_leaves` micro-batches: it has a power of two of
    branches, so that each is whole, and each process has some in a row."""

    size: int
    n_leaves: int

    @property
    def n(self) -> int:
        return 1 << (self.size - 1).bit_length()

    @property
    def leaves_each(self) -> int:
        whole = 1 << (self.n_leaves - 1).bit_length()
        return max(1, whole // self.n)

    def owner(self, branch: int) -> int:
        return branch * self.size // self.n

    def of(self, rank: int) -> range:
        found = [branch for branch in range(self.n) if self.owner(branch) == rank]
        return range(found[0], found[-1] + 1)

    def leaves(self, rank: int) -> range:
        """The micro-batches of one process; there may be none."""
        mine, each = self.of(rank), self.leaves_each
        return range(min(mine.start * each, self.n_leaves), min(mine.stop * each, self.n_leaves))


@dataclass(slots=True)
class Tree:
    """A sum that grows leaf by leaf, and holds no more than one branch of each height."""

    _branches: list[tuple[int, Gradients]] = field(default_factory=list)

    def grow(self, leaf: Gradients) -> None:
        height, branch = 0, leaf
        while self._branches and self._branches[-1][0] == height:
            branch = add(self._branches.pop()[1], branch)
            height += 1
        self._branches.append((height, branch))

    @property
    def has_grown(self) -> bool:
        return bool(self._branches)

    def total(self) -> Gradients:
        """All leaves, with nothing in the place of those that a whole tree has more."""
        branches = [branch for _, branch in self._branches]
        while len(branches) > 1:
            last = branches.pop()
            branches[-1] = add(branches[-1], last)
        return branches[0]


class Elastic(ParallelModel):
    """A model of which every process has a copy, and gradients in the order of the tree."""

    @property
    def grad_divisor(self) -> int:
        return 1

    def forward_backward(self, batches: Iterable[Any], precision: str) -> tuple[float, int]:
        """Gradients, nats and count of all micro-batches, of which these are this process's, those
        of `ReductionTree.leaves`."""
        own, world = list(batches), self.world
        branches = ReductionTree(world.size, int(world.all_sum(len(own))[0]))
        trees = {number: Tree() for number in branches.of(world.rank)}
        parameters = [part.parameter for part in self.shards.values()]
        nats, count = [0.0] * (branches.leaves_each * len(trees)), 0
        self.forward_seconds = 0.0
        for place, batch in enumerate(own):
            self.lm_loss.zero_grad(set_to_none=True)
            began = time.perf_counter()
            with world.autocast(precision):
                batch_nats, batch_count = self.lm_loss(batch.to(world.device))
            self.forward_seconds += time.perf_counter() - began
            batch_nats.backward()
            number = branches.of(world.rank).start + place // branches.leaves_each
            trees[number].grow([_coalesced(parameter.grad) for parameter in parameters])
            nats[place], count = float(batch_nats.detach()), count + int(batch_count)
        # A process may have more leaves than another: that does not make it slow.
        self.forward_seconds /= max(1, len(own))
        sums = {number: tree.total() for number, tree in trees.items() if tree.has_grown}
        for parameter, gradient in zip(
            parameters, broadcast_branches(sums, parameters, branches), strict=True
        ):
            parameter.grad = gradient
        return math.fsum(world.all_gather_uneven(nats)), int(world.all_sum(count)[0])


def _coalesced(gradient: Tensor | None) -> Tensor | None:
    return gradient.coalesce() if gradient is not None and gradient.is_sparse else gradient


def broadcast_branches(
    own: dict[int, Gradients], parameters: Sequence[nn.Parameter], branches: ReductionTree
) -> Gradients:
    """The sum of all branches, for everybody, from each process's `own` by number."""
    tree, nothing = Tree(), [None] * len(parameters)
    for number in range(branches.n):
        if number * branches.leaves_each < branches.n_leaves:
            here, owner = own.get(number, nothing), branches.owner(number)
            told = zip(here, parameters, strict=True)
            tree.grow([_told(g, p, owner, branches.size) for g, p in told])
    return tree.total()


def _told(gradient: Tensor | None, parameter: nn.Parameter, owner: int, size: int) -> Tensor | None:
    """A gradient that process `owner` has."""
    if size == 1:
        return gradient
    is_here = dist.get_rank() == owner
    if is_here and gradient is None:
        gradient = torch.zeros_like(parameter)
    n = -1 if gradient is None or not gradient.is_sparse else gradient._nnz()
    n_rows = torch.tensor([n], device=parameter.device)
    dist.broadcast(n_rows, owner)
    if n_rows < 0:
        dense = gradient if is_here and gradient is not None else torch.empty_like(parameter)
        dist.broadcast(dense, owner)
        return dense
    n = int(n_rows)
    if gradient is not None and is_here:
        rows, values = gradient.indices().contiguous(), gradient.values().contiguous()
    else:
        rows = torch.empty(1, n, dtype=torch.int64, device=parameter.device)
        values = parameter.new_empty(n, *parameter.shape[1:])
    dist.broadcast(rows, owner)
    dist.broadcast(values, owner)
    return torch.sparse_coo_tensor(
        rows, values, parameter.shape, is_coalesced=True, check_invariants=False
    )
