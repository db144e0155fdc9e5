"""The context axis: each process has a stretch of every window, and keys and values of the ones
before it.

Keys and values of all stretches are gathered, which costs less than to pass them around while a
window fits the memory of a process ("The Llama 3 Herd of Models", Grattafiori et al., 2024, section
3.3.2). To the decoder it is as if it went on from a cache: positions, masks and n-grams follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.model.dropout import ATTENTION_DROPOUT_ID, DropoutRng
from pretrain.model.layers import KeyValueCache


class ContextParallelCache(KeyValueCache):
    """What a decoder takes for a cache: the stretches before its own, as the others have them."""

    def __init__(self, group: dist.ProcessGroup, stretch_tokens: int) -> None:
        super().__init__()
        self._group, self._tokens = group, stretch_tokens
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    @property
    def length(self) -> int:
        return self._rank * self._tokens

    def append_ids(self, ids_BT: Tensor) -> Tensor:
        found = [torch.empty_like(ids_BT) for _ in range(self._size)]
        dist.all_gather(found, ids_BT.contiguous(), group=self._group)
        return torch.cat(found[: self._rank], dim=1) if self._rank else ids_BT[:, :0]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        stop = self.length + self._tokens
        both: Tensor = _Gather.apply(torch.stack([key, value]), self._group)  # type: ignore[no-untyped-call]
        keys, values = both[:, :, :, :stop].unbind()
        return keys, values


class _Gather(torch.autograd.Function):
    """The stretches (..., T, E) of all processes, one after another; back goes the sum of what all
    say of each."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.n = group, mine.shape[-2]
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, mine.contiguous(), group=group)
        return torch.cat(found, dim=-2)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        pieces = [piece.contiguous() for piece in torch.split(slopes[0], ctx.n, dim=-2)]
        mine = torch.empty_like(pieces[0])
        dist.reduce_scatter(mine, pieces, group=ctx.group)
        return mine, None


@dataclass(frozen=True, slots=True)
class ShardedDropoutRng(DropoutRng):
    """The masks of whole windows and all heads, of which this process has a stretch and some."""

    stretch: tuple[int, int] = (0, 1)
    """its number, and how many there are"""
    heads: tuple[int, int] = (0, 1)

    def mask(self, shape: Sequence[int], rate: float, *, layer: int, dropout_id: int) -> Tensor:
        number, n = self.stretch
        if dropout_id != ATTENTION_DROPOUT_ID:
            B, T, *rest = shape
            whole = DropoutRng.mask(
                self, (B, n * T, *rest), rate, layer=layer, dropout_id=dropout_id
            )
            return whole[:, number * T : (number + 1) * T]
        B, H, T, S = shape
        head, n_heads = self.heads
        whole = DropoutRng.mask(
            self, (B, H * n_heads, n * T, n * T), rate, layer=layer, dropout_id=dropout_id
        )
        return whole[:, head * H : (head + 1) * H, number * T : (number + 1) * T, :S]
