"""Muon where matrices are laid over processes: each matrix has an owner that makes its update.

Momentum stays where the weights are. What the rule makes orthogonal goes to the owners, round robin
over matrices of one shape, and what comes of it goes back, row by row: the exchange of "Muon is
Scalable for LLM Training" (Liu et al., 2025), without a copy of the products on every process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.optimizer.muon import Matrices, orthogonalize
from pretrain.parallel.shards import Part


class SharedMatrices(Matrices):
    """Matrices of which this process holds some rows each, as the others of `group` do."""

    def __init__(self, parts: Mapping[nn.Parameter, Part], group: dist.ProcessGroup) -> None:
        self._parts, self._group = parts, group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def shape_of(self, parameter: nn.Parameter) -> torch.Size:
        return self._parts[parameter].shape

    def orthogonalized(
        self, parameters: Sequence[nn.Parameter], rows: Sequence[Tensor], *, dtype: torch.dtype
    ) -> list[Tensor]:
        """The local rows of what the whole matrices become."""
        M, K = self.shape_of(parameters[0])
        heights = [len(part) for part in torch.empty(M, 0).chunk(self._size)]
        heights += [0] * (self._size - len(heights))
        mine = heights[self._rank]
        n_owned = [len(rows[owner :: self._size]) for owner in range(self._size)]
        sent = torch.cat(
            [t.reshape(-1) for owner in range(self._size) for t in rows[owner :: self._size]]
        )
        sizes_out = [n * mine * K for n in n_owned]
        sizes_in = [n_owned[self._rank] * height * K for height in heights]
        received = sent.new_empty(sum(sizes_in))
        dist.all_to_all_single(received, sent, sizes_in, sizes_out, group=self._group)
        pieces = [
            piece.view(n_owned[self._rank], height, K)
            for piece, height in zip(torch.split(received, sizes_in), heights, strict=True)
        ]
        whole_NMK = torch.cat(pieces, dim=1)
        if len(whole_NMK):
            whole_NMK = orthogonalize(whole_NMK, dtype=dtype)
        answer = torch.cat([piece.reshape(-1) for piece in torch.split(whole_NMK, heights, dim=1)])
        returned = torch.empty_like(sent)
        dist.all_to_all_single(returned, answer, sizes_out, sizes_in, group=self._group)
        found: list[Tensor] = [sent] * len(rows)
        for owner, flat in enumerate(torch.split(returned, sizes_out)):
            for place, row in enumerate(flat.view(n_owned[owner], mine, K)):
                found[owner + place * self._size] = row
        return found
