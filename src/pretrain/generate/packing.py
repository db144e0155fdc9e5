"""A decoder that is only read from now on, laid out in memory for a token at a time on a CPU.

A decoder goes in and stays what it is: each weight keeps its name, shape and values, and its new
memory. A token at a time, a product takes as long as to read its matrix, so that is what is made
faster here. On another device nothing changes.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from pretrain.compat import speed_up_attribute_access
from pretrain.model import Decoder
from pretrain.model.layers import Block

# Matrices start where a line of the cache does.
_LINE_BYTES = 64


@torch.no_grad()
def pack_weights(decoder: Decoder) -> None:
    """Lay the matrices of a decoder that is only read from now on as they are read fastest.

    Those that read the same input become one; tall ones lie by columns, since MKL reads twice as
    fast along the longer side; all are in one piece of memory with large pages. Tables that rows
    are only looked up in stay where they are.
    """
    if decoder.device.type != "cpu":
        return
    head = decoder.token_embedding if decoder.head is None else decoder.head
    layers = [m for m in decoder.blocks.modules() if isinstance(m, nn.Linear)]
    memory = _Memory([head.weight, *(layer.weight for layer in layers)])
    for block in decoder.blocks.values():
        assert isinstance(block, Block)
        attention, feed_forward = block.attention, block.feed_forward
        attention.packed = memory.place(attention.query, attention.key, attention.value)
        memory.place(attention.output)
        if feed_forward.gate is None:
            memory.place(feed_forward.up)
        else:
            feed_forward.packed = memory.place(feed_forward.gate, feed_forward.up)
        memory.place(feed_forward.down)
    memory.place(head)
    speed_up_attribute_access(decoder)


class _Memory:
    """A piece of memory for weights, in pages of 2 MiB where the system has them: with its usual
    4 KiB a product waits for addresses."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        n_bytes = sum(weight.nbytes + _LINE_BYTES for weight in weights)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Shared memory, the default, would need another permission for large pages.
            self._room = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel built without them
                self._room.madvise(mmap.MADV_HUGEPAGE)
        else:
            self._room = mmap.mmap(-1, n_bytes)
        self._used = 0

    def place(self, *layers: nn.Linear | nn.Embedding) -> tuple[Tensor, Tensor | None]:
        """Move the weights of layers that read the same input here, side by side; returns one
        weight (F, D) and one bias (F), of which theirs are now views."""
        weights = [layer.weight for layer in layers]
        biases = [b for m in layers if isinstance(b := getattr(m, "bias", None), Tensor)]
        widths = [len(weight) for weight in weights]
        F, D = sum(widths), weights[0].shape[1]
        flat = torch.frombuffer(self._room, dtype=weights[0].dtype, count=F * D, offset=self._used)
        self._used += -(-flat.nbytes // _LINE_BYTES) * _LINE_BYTES
        weight_FD = flat.view(D, F).T if F > D else flat.view(F, D)
        for weight, rows in zip(weights, torch.split(weight_FD, widths), strict=True):
            weight.data = rows.copy_(weight)
        if not biases:
            return weight_FD, None
        bias_F = torch.cat(biases)
        for bias, part in zip(biases, torch.split(bias_F, widths), strict=True):
            bias.data = part
        return weight_FD, bias_F
