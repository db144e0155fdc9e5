"""Pack the weights of a decoder for generation on a CPU, one token at a time.

With one token a matmul takes as long as reading its matrix, so the matrices are stored in the order
in which they are read. Names, shapes and values of all weights stay; on other devices nothing
changes.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from pretrain.compat import speed_up_attribute_access
from pretrain.model.counts import CountDecoder
from pretrain.model.decoder import Decoder
from pretrain.model.layers import Block, PackedWeights
from pretrain.model.mixture import Mixture

# Matrices are aligned to the lines of the CPU's cache.
_LINE_BYTES = 64


@torch.no_grad()
def pack_weights(decoder: Decoder) -> None:
    """Move the matrices of a decoder, which is not trained any more, into one buffer, in place.

    Layers with the same input become one matrix; tall matrices are stored by columns, since MKL
    reads twice as fast along the longer side; the buffer has large pages. Embedding tables that
    are only looked up stay.
    """
    if decoder.device.type != "cpu":
        return
    if isinstance(decoder, Mixture):
        for part in decoder.decoders:
            pack_weights(part)
        return
    if isinstance(decoder, CountDecoder):
        return
    head = decoder.token_embedding if decoder.head is None else decoder.head
    layers = [m for m in decoder.blocks.modules() if isinstance(m, nn.Linear)]
    buffer = _WeightBuffer([head.weight, *(layer.weight for layer in layers)])
    for block in decoder.blocks.values():
        assert isinstance(block, Block)
        attention, feed_forward = block.attention, block.feed_forward
        attention.packed = buffer.move(attention.query, attention.key, attention.value)
        buffer.move(attention.output)
        if feed_forward.gate is None:
            buffer.move(feed_forward.up)
        else:
            feed_forward.packed = buffer.move(feed_forward.gate, feed_forward.up)
        buffer.move(feed_forward.down)
    buffer.move(head)
    speed_up_attribute_access(decoder)


class _WeightBuffer:
    """Memory for weights in pages of 2 MiB where the system has them: with the usual 4 KiB a matmul
    waits for address translation."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        n_bytes = sum(weight.nbytes + _LINE_BYTES for weight in weights)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Large pages of shared memory, the default, need a permission.
            self._memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel built without large pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            self._memory = mmap.mmap(-1, n_bytes)
        self._used_bytes = 0

    def move(self, *layers: nn.Linear | nn.Embedding) -> PackedWeights:
        """Move the weights of layers with the same input here, next to each other.

        Returns one weight (F, D) and one bias (F); the layers' own are now views of them.
        """
        weights = [layer.weight for layer in layers]
        biases = [b for m in layers if isinstance(b := getattr(m, "bias", None), Tensor)]
        widths = [len(weight) for weight in weights]
        F, D = sum(widths), weights[0].shape[1]
        flat = torch.frombuffer(
            self._memory, dtype=weights[0].dtype, count=F * D, offset=self._used_bytes
        )
        self._used_bytes += math.ceil(flat.nbytes / _LINE_BYTES) * _LINE_BYTES

        weight_FD = flat.view(D, F).T if F > D else flat.view(F, D)
        for weight, rows in zip(weights, torch.split(weight_FD, widths), strict=True):
            weight.data = rows.copy_(weight)
        if not biases:
            return weight_FD, None
        bias_F = torch.cat(biases)
        for bias, part in zip(biases, torch.split(bias_F, widths), strict=True):
            bias.data = part
        return weight_FD, bias_F
