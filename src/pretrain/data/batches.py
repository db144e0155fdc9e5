"""Windows as tensors: the micro-batches of training, and one pass over a split for evaluation."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.order import MixtureOrder, Order, ceil_div

IGNORE_INDEX = -100
"""Target without a loss: the padding of a batch. The value of `model.loss` and of torch."""


class Stream(Protocol):
    """A text as token ids, on disk (`TokenStream`) or in memory."""

    @property
    def n_tokens(self) -> int: ...

    def read(self, start: int, stop: int) -> NDArray[np.int64]: ...


class MicroBatch(NamedTuple):
    """Sequences that go through the model at once."""

    inputs: Tensor
    """ids (B, T), int64"""
    targets: Tensor
    """the id after each input (B, T), int64; IGNORE_INDEX where there is no loss"""
    samples: Tensor
    """the global number of each row's window (B,), int64"""

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to a device; from pinned memory, so a GPU does not wait for the copy."""
        if device.type == "cuda" and self.inputs.device.type == "cpu":
            self = MicroBatch(*(part.pin_memory() for part in self))
        return MicroBatch(*(part.to(device, non_blocking=True) for part in self))

    def checksum(self) -> int:
        """The sum of the CRC-32 of the T + 1 ids (int64) of each row whose targets are valid."""
        rows = zip(self.inputs.numpy(), self.targets.numpy(), strict=True)
        return sum(
            zlib.crc32(targets[-1:], zlib.crc32(inputs))
            for inputs, targets in rows
            if targets[-1] != IGNORE_INDEX
        )


def micro_batch_at(
    stream: Stream,
    order: Order | MixtureOrder,
    *,
    sample: int,
    rows: int,
    valid_rows: int | None = None,
) -> MicroBatch:
    """Read samples [sample, sample + rows) of a run: a pure function of its arguments.

    Only the first `valid_rows` have a loss (by default all). The targets of the others are
    IGNORE_INDEX: all micro-batches have one shape, as a compiler needs it, whether or not they
    divide the batch.
    """
    samples = np.arange(sample, sample + rows, dtype=np.int64)
    starts = order.window_starts(samples).tolist()
    length = order.context_length + 1
    windows = np.stack([stream.read(start, start + length) for start in starts])
    ids = torch.from_numpy(windows)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if valid_rows is not None:
        targets[valid_rows:] = IGNORE_INDEX
    return MicroBatch(inputs, targets, torch.from_numpy(samples))


def resolve_stride(stride: int | None, context_length: int) -> int:
    """Ids from the start of one evaluation window to the next; by default windows do not overlap.

    ValueError for a stride that would leave targets out.
    """
    if stride is None:
        return context_length
    if not 1 <= stride <= context_length:
        raise ValueError(f"stride must be 1 to {context_length}, the context length (got {stride})")
    return stride


def evaluation_batches(
    stream: Stream,
    *,
    context_length: int,
    rows: int,
    stride: int | None = None,
    limit_tokens: int | None = None,
    half: int | None = None,
    rank: int = 0,
    size: int = 1,
) -> Iterator[MicroBatch]:
    """Yield the stream in order, in windows that start every `stride` ids: every id but the first
    is a valid target exactly once.

    By default windows do not overlap; where they do, targets of an earlier window are only context
    in the next. With `limit_tokens` every n-th window is taken, always the same ones, for about
    that number of valid targets; of the windows taken, `half` 0 is the first half and 1 the second,
    which one window leaves empty. The last window is padded. Of `size` processes each gets every
    `size`-th batch, and all get the same number of batches, of which the last may have no valid
    target. ValueError for a stride that would leave targets out.
    """
    stride = resolve_stride(stride, context_length)
    n_targets = stream.n_tokens - 1
    n_windows = 0
    if n_targets > 0:
        n_windows = 1 + max(0, ceil_div(n_targets - context_length, stride))
    every = 1 if limit_tokens is None else max(1, ceil_div(n_targets, limit_tokens))
    chosen = range(0, n_windows, every)
    if half is not None:
        middle = ceil_div(len(chosen), 2)
        chosen = chosen[middle:] if half else chosen[:middle]
    for first in range(0, len(chosen), rows * size):
        windows = chosen[first + rank * rows :][:rows]
        inputs = torch.zeros(max(1, len(windows)), context_length, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE_INDEX)
        for row, window in enumerate(windows):
            start = window * stride
            stop = min(start + context_length, n_targets)
            n_context = context_length - stride if window else 0
            ids = torch.from_numpy(stream.read(start, stop + 1))
            inputs[row, : stop - start] = ids[:-1]
            targets[row, n_context : stop - start] = ids[1 + n_context :]
        yield MicroBatch(inputs, targets, torch.tensor(list(windows) or [0]))
