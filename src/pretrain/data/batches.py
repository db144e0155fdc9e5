"""Windows as tensors: the micro-batches of training, and the plain walk over a split for
evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.mixture import Mixture
from pretrain.data.order import Order

# A target that is not counted: the padding of the last row of an evaluation.
IGNORE_INDEX = -100


class Stream(Protocol):
    """Ids in a row, on disk (`TokenStream`) or in memory."""

    @property
    def n_tokens(self) -> int: ...

    def read(self, start: int, stop: int) -> NDArray[np.int64]: ...


class MicroBatch(NamedTuple):
    """Rows that go through the model at once."""

    inputs: Tensor
    """ids (B, T), int64"""
    targets: Tensor
    """the id after each input (B, T), int64; NOT_COUNTED where there is none"""
    samples: Tensor
    """the global number of each row's window (B), int64"""

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cuda" and self.inputs.device.type == "cpu":
            # Else a copy waits for all that the GPU has been told to do before it.
            self = MicroBatch(*(part.pin_memory() for part in self))
        return MicroBatch(*(part.to(device, non_blocking=True) for part in self))


def micro_batch_at(
    stream: Stream,
    *,
    context_length: int,
    seed: int,
    sample: int,
    rows: int,
    order: Order | Mixture | None = None,
) -> MicroBatch:
    """Samples [sample, sample + rows) of a run: a pure function of its arguments.

    `order` is by default that of the whole stream. Raises ValueError when the context does not fit
    the stream.
    """
    order = order if order is not None else Order(stream.n_tokens, context_length, seed)
    samples = np.arange(sample, sample + rows, dtype=np.int64)
    windows = np.stack([stream.read(s, s + context_length + 1) for s in order.starts(samples)])
    ids = torch.from_numpy(windows)
    return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.from_numpy(samples))


def checked_stride(stride: int | None, context_length: int) -> int:
    """Ids from the beginning of one window to that of the next: as many as a window has, unless
    said otherwise. ValueError for a stride that would leave targets out."""
    stride = context_length if stride is None else stride
    if not 1 <= stride <= context_length:
        raise ValueError(f"the stride is {stride}; legal: 1 to the context of {context_length}")
    return stride


def evaluation_batches(
    stream: Stream,
    *,
    context_length: int,
    rows: int,
    stride: int | None = None,
    limit_tokens: int | None = None,
    rank: int = 0,
    size: int = 1,
) -> Iterator[MicroBatch]:
    """The whole stream in order, in windows that begin every `stride` ids and by default do not
    overlap: every id but the first is a target once.

    Where windows overlap, what an earlier one counted is only context in the next. With
    `limit_tokens` only every n-th window is taken, evenly spread, always the same ones, so that
    about that many targets are counted. The last window is padded with targets that are not
    counted. Of `size` processes each gets every `size`-th batch, and as many as the others, the
    last one perhaps of nothing that counts. ValueError for a stride that would leave targets out.
    """
    stride = checked_stride(stride, context_length)
    n_targets = stream.n_tokens - 1
    n_windows = 1 + max(0, -(-(n_targets - context_length) // stride)) if n_targets > 0 else 0
    every = 1 if limit_tokens is None else max(1, -(-n_targets // limit_tokens))
    chosen = range(0, n_windows, every)
    for first in range(0, len(chosen), rows * size):
        windows = chosen[first + rank * rows :][:rows]
        if not windows:
            nothing = torch.zeros(1, context_length, dtype=torch.int64)
            yield MicroBatch(nothing, torch.full_like(nothing, IGNORE_INDEX), torch.zeros(1).long())
            continue
        inputs = torch.zeros(len(windows), context_length, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE_INDEX)
        for row, window in enumerate(windows):
            start = window * stride
            stop = min(start + context_length, n_targets)
            counted = context_length - stride if window else 0
            ids = torch.from_numpy(stream.read(start, stop + 1))
            inputs[row, : stop - start] = ids[:-1]
            targets[row, counted : stop - start] = ids[1 + counted :]
        yield MicroBatch(inputs, targets, torch.tensor(list(windows)))
