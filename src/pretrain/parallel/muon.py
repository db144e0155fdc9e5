"""Muon where matrices are laid over processes: each matrix has an owner that makes its update.

Momentum stays where the weights are. What the rule makes orthogonal goes to the owners, round robin
over matrices of one shape, and what comes of it goes back, row by row: the exchange of "Muon is
Scalable for LLM Training" (Liu et al., 2025), without a copy of the products on every process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.optim.muon import Orthogonalizer, orthogonalize
from pretrain.parallel.shards import LocalShard, ShardLayout, cut


class ShardedOrthogonalizer(Orthogonalizer):
    """Matrices of which this process holds a box each, as the others of `group` do."""

    def __init__(
        self, parts: Mapping[str, LocalShard], boxes: ShardLayout, group: dist.ProcessGroup
    ) -> None:
        self._names = {part.local: name for name, part in parts.items()}
        self._parts, self._boxes, self._group = parts, boxes, group
        self._ranks = dist.get_process_group_ranks(group)
        self._rank = dist.get_rank(group)

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        return self._parts[self._names[parameter]].shape

    def orthogonalize(
        self, parameters: Sequence[nn.Parameter], rows: Sequence[Tensor], *, dtype: torch.dtype
    ) -> list[Tensor]:
        """The local boxes of what the whole matrices become."""
        names, size = [self._names[parameter] for parameter in parameters], len(self._ranks)
        owned = [list(range(owner, len(rows), size)) for owner in range(size)]
        mine = owned[self._rank]
        sent = torch.cat([rows[i].reshape(-1) for numbers in owned for i in numbers])
        sizes_out = [sum(rows[i].numel() for i in numbers) for numbers in owned]
        whole = sent.new_empty(len(mine), *self.full_shape(parameters[0]))
        # Views into what this process owns, in the order in which they come: by rank.
        views = [
            [cut(whole[n], self._box(names[i], rank)) for n, i in enumerate(mine)]
            for rank in self._ranks
        ]
        sizes_in = [sum(view.numel() for view in some) for some in views]
        received = self._exchange(sent, sizes_out, sizes_in)
        for view, piece in _in_order(views, received):
            view.copy_(piece)
        if mine:
            whole.copy_(orthogonalize(whole, dtype=dtype))
        answer = [view.reshape(-1) for some in views for view in some]
        returned = self._exchange(torch.cat(answer) if answer else sent[:0], sizes_in, sizes_out)
        found = [torch.empty_like(row) for row in rows]
        for place, piece in _in_order([[found[i] for i in numbers] for numbers in owned], returned):
            place.copy_(piece)
        return found

    def _box(self, name: str, rank: int) -> tuple[tuple[int, int], ...]:
        box = self._boxes.box(name, rank)
        assert box is not None
        return box

    def _exchange(self, sent: Tensor, sizes_out: list[int], sizes_in: list[int]) -> Tensor:
        received = sent.new_empty(sum(sizes_in))
        dist.all_to_all_single(received, sent, sizes_in, sizes_out, group=self._group)
        return received


def _in_order(places: list[list[Tensor]], flat: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each place with its numbers, which lie one after another in `flat`."""
    row = [place for some in places for place in some]
    stops = list(accumulate(place.numel() for place in row))
    return [
        (place, flat[stop - place.numel() : stop].view(place.shape))
        for place, stop in zip(row, stops, strict=True)
    ]
