"""Context parallelism: each rank of the cp axis has one chunk of every window.

Keys and values of all chunks are gathered, which costs less than to pass them around a ring as long
as a window fits the memory of one process ("The Llama 3 Herd of Models", Grattafiori et al., 2024,
section 3.3.2). To the decoder the chunks before its own look like a cache of keys and values, so
positions, masks and n-grams need no special case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pretrain.model.decoder import Decoder
from pretrain.model.dropout import ATTENTION_DROPOUT_ID, DropoutRng
from pretrain.model.layers import KeyValueCache


class InputSharding:
    """The part of a micro-batch that this rank computes: its chunk of each window (cp) and its
    attention heads (tp), as arguments of the decoder."""

    def __init__(self, decoder: Decoder, mesh: DeviceMesh) -> None:
        self._group = mesh["cp"].get_group()
        self._chunk = mesh["cp"].get_local_rank(), mesh["cp"].size()
        self._heads = mesh["tp"].get_local_rank(), mesh["tp"].size()
        self._chunk_tokens = 0
        """tokens of a chunk; 0 outside of `local_chunk`, where windows are not split"""
        decoder.register_forward_pre_hook(self._add_arguments, with_kwargs=True)

    @contextmanager
    def local_chunk(self, batch: Any) -> Iterator[Any]:
        """Yield this rank's chunk of each window (B, T / cp), for one forward pass."""
        index, n = self._chunk
        if n == 1:
            yield batch
            return
        self._chunk_tokens = T = batch.inputs.shape[1] // n
        columns = slice(index * T, (index + 1) * T)
        try:
            yield batch._replace(inputs=batch.inputs[:, columns], targets=batch.targets[:, columns])
        finally:
            self._chunk_tokens = 0

    def _add_arguments(
        self, decoder: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: the cache that gathers the other chunks, and the dropout masks of this
        chunk and these heads."""
        chunk = (0, 1)
        if self._chunk_tokens:
            chunk = self._chunk
            kwargs["cache"] = ContextParallelCache(self._group, self._chunk_tokens)
        if (rng := kwargs.get("dropout_rng")) is not None:
            kwargs["dropout_rng"] = ShardedDropoutRng(rng.seed, rng.samples_B, chunk, self._heads)
        return args, kwargs


class ContextParallelCache(KeyValueCache):
    """Keys and values of the chunks before this rank's, gathered from the ranks that have them."""

    def __init__(self, group: dist.ProcessGroup, chunk_tokens: int) -> None:
        super().__init__()
        self._group, self._tokens = group, chunk_tokens
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    @property
    def length(self) -> int:
        return self._rank * self._tokens

    def append_ids(self, ids_BT: Tensor) -> Tensor:
        chunks = [torch.empty_like(ids_BT) for _ in range(self._size)]
        dist.all_gather(chunks, ids_BT.contiguous(), group=self._group)
        return torch.cat(chunks[: self._rank], dim=1) if self._rank else ids_BT[:, :0]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        stop = self.length + self._tokens
        both: Tensor = _GatherChunks.apply(torch.stack([key, value]), self._group)  # type: ignore[no-untyped-call]
        keys, values = both[:, :, :, :stop].unbind()
        return keys, values


class _GatherChunks(torch.autograd.Function):
    """Concatenate the chunks (..., T, E) of all ranks; backward sums each chunk's gradients."""

    @staticmethod
    def forward(ctx: Any, chunk: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.n_tokens = group, chunk.shape[-2]
        chunks = [torch.empty_like(chunk) for _ in range(dist.get_world_size(group))]
        dist.all_gather(chunks, chunk.contiguous(), group=group)
        return torch.cat(chunks, dim=-2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        chunks = [chunk.contiguous() for chunk in torch.split(grads[0], ctx.n_tokens, dim=-2)]
        own = torch.empty_like(chunks[0])
        dist.reduce_scatter(own, chunks, group=ctx.group)
        return own, None


@dataclass(frozen=True, slots=True)
class ShardedDropoutRng(DropoutRng):
    """Masks of this rank's chunk and heads, cut from those of full windows and all heads."""

    chunk: tuple[int, int] = (0, 1)
    """index of the chunk, and number of chunks of a window"""
    heads: tuple[int, int] = (0, 1)
    """index of the group of heads, and number of groups"""

    def mask(self, shape: Sequence[int], rate: float, *, layer: int, dropout_id: int) -> Tensor:
        index, n = self.chunk
        if dropout_id != ATTENTION_DROPOUT_ID:
            B, T, *rest = shape
            full_shape: Sequence[int] = (B, n * T, *rest)
            full = DropoutRng.mask(self, full_shape, rate, layer=layer, dropout_id=dropout_id)
            return full[:, index * T : (index + 1) * T]
        B, H, T, S = shape
        group, n_groups = self.heads
        full_shape = (B, H * n_groups, n * T, n * T)
        full = DropoutRng.mask(self, full_shape, rate, layer=layer, dropout_id=dropout_id)
        return full[:, group * H : (group + 1) * H, index * T : (index + 1) * T, :S]
