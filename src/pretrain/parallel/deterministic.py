"""Deterministic gradient reduction: gradients whose bits do not depend on the number of processes.

A floating-point sum depends on the order of its terms. Here the order is that of a binary tree over
the micro-batches of a step, whichever process computes which leaf (the aim of "EasyScale", Li et
al., 2023). Each process computes some branches of the tree; their sums are broadcast, and every
process adds up the top of the tree itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.distributed import World
from pretrain.model.loss import LMLoss

Gradients = list[Tensor | None]
"""One sum of gradients per parameter; None for a parameter without one."""


@dataclass(frozen=True, slots=True)
class ReductionTree:
    """How `size` processes share a binary tree over `n_leaves` micro-batches.

    The tree is cut into a power of two of equal branches, at least one per process, and each
    process has consecutive ones. Trailing leaves of the tree may be empty.
    """

    size: int
    n_leaves: int

    @property
    def n_branches(self) -> int:
        return 1 << (self.size - 1).bit_length()

    @property
    def leaves_per_branch(self) -> int:
        n_leaves_of_full_tree = 1 << (self.n_leaves - 1).bit_length()
        return max(1, n_leaves_of_full_tree // self.n_branches)

    def owner(self, branch: int) -> int:
        """The rank that computes a branch."""
        return branch * self.size // self.n_branches

    def first_branch(self, rank: int) -> int:
        """The first branch that a rank computes."""
        return math.ceil(rank * self.n_branches / self.size)

    def leaves(self, rank: int) -> range:
        """The micro-batches that a rank computes; there may be none."""
        start, stop = (self.first_branch(r) * self.leaves_per_branch for r in (rank, rank + 1))
        return range(min(start, self.n_leaves), min(stop, self.n_leaves))


@dataclass(slots=True)
class TreeSum:
    """A sum in the order of a binary tree, which stores at most one branch of each height."""

    _branches: list[tuple[int, Gradients]] = field(default_factory=list)

    def add(self, leaf: Gradients) -> None:
        height, branch = 0, leaf
        while self._branches and self._branches[-1][0] == height:
            branch = _add(self._branches.pop()[1], branch)
            height += 1
        self._branches.append((height, branch))

    def total(self) -> Gradients:
        """The sum of all leaves; leaves that a full tree has in addition count as zero."""
        branches = [branch for _, branch in self._branches]
        while len(branches) > 1:
            last = branches.pop()
            branches[-1] = _add(branches[-1], last)
        return branches[0]


def _add(one: Gradients, other: Gradients) -> Gradients:
    sums: Gradients = []
    for a, b in zip(one, other, strict=True):
        if a is None or b is None:
            sums.append(b if a is None else a)
        else:
            # Coalesced, so that each row is summed in the order of the tree, too.
            sums.append((a + b).coalesce() if a.is_sparse else a + b)
    return sums


def forward_backward(
    lm_loss: LMLoss, own: list[Any], world: World, forward: Callable[[Any], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Compute the summed gradients of all micro-batches, of which this process has its `own`
    (`ReductionTree.leaves`). Returns the nats and the number of valid targets of all processes."""
    tree = ReductionTree(world.size, int(world.all_sum(len(own))[0]))
    first_branch = tree.first_branch(world.rank)
    sums: defaultdict[int, TreeSum] = defaultdict(TreeSum)
    parameters = list(lm_loss.decoder.parameters())
    nats, n_targets = [], 0
    for leaf, micro_batch in enumerate(own):
        lm_loss.zero_grad(set_to_none=True)
        leaf_nats, leaf_targets = forward(micro_batch)
        leaf_nats.backward()  # type: ignore[no-untyped-call]
        grads = [parameter.grad for parameter in parameters]
        grads = [g.coalesce() if g is not None and g.is_sparse else g for g in grads]
        sums[first_branch + leaf // tree.leaves_per_branch].add(grads)
        nats.append(float(leaf_nats.detach()))
        n_targets += int(leaf_targets)

    total = TreeSum()
    for branch in range(math.ceil(tree.n_leaves / tree.leaves_per_branch)):  # others are empty
        grads = sums[branch].total() if branch in sums else [None] * len(parameters)
        if world.size > 1:
            owner = tree.owner(branch)
            pairs = zip(grads, parameters, strict=True)
            grads = [broadcast_grad(grad, parameter, owner) for grad, parameter in pairs]
        total.add(grads)
    for parameter, grad in zip(parameters, total.total(), strict=True):
        parameter.grad = grad
    # Exact sums, so that they do not depend on the order either.
    all_nats = torch.tensor(world.fsum(nats), dtype=torch.float64)
    all_targets = torch.tensor(int(world.all_sum(n_targets)[0]))
    return all_nats, all_targets


def broadcast_grad(grad: Tensor | None, parameter: nn.Parameter, owner: int) -> Tensor:
    """Send a gradient, dense or sparse, from rank `owner` to all; None is sent as zeros."""
    is_owner, device = dist.get_rank() == owner, parameter.device
    if not is_owner or grad is None:
        grad = torch.zeros_like(parameter)
    n_rows = torch.tensor([grad.values().shape[0] if grad.is_sparse else -1], device=device)
    dist.broadcast(n_rows, owner)
    n = int(n_rows)
    if n < 0:
        dist.broadcast(grad, owner)
        return grad
    if is_owner:
        rows, values = grad.indices().contiguous(), grad.values().contiguous()
    else:
        rows = torch.empty(1, n, dtype=torch.int64, device=device)
        values = parameter.new_empty(n, *parameter.shape[1:])
    dist.broadcast(rows, owner)
    dist.broadcast(values, owner)
    return torch.sparse_coo_tensor(
        rows, values, parameter.shape, is_coalesced=True, check_invariants=False
    )
