"""Micro-batches of training: targets are shifted inputs, padding has no loss, checksums are those
of the windows."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.data.batches import IGNORE_INDEX, micro_batch_at
from pretrain.data.order import Order
from pretrain.model import loss


class MemoryStream:
    """A text in memory: id n at position n."""

    n_tokens = 200

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.arange(start, stop, dtype=np.int64)


def test_data_and_model_ignore_the_same_target() -> None:
    assert IGNORE_INDEX == loss.IGNORE_INDEX


def test_a_micro_batch_has_the_windows_of_its_samples() -> None:
    stream, order = MemoryStream(), Order(MemoryStream.n_tokens, 8, seed=3)
    batch = micro_batch_at(stream, order, sample=5, rows=4, valid_rows=3)
    assert batch.samples.tolist() == [5, 6, 7, 8]
    starts = order.window_starts(batch.samples.numpy()).tolist()
    windows = [np.arange(start, start + 9, dtype=np.int64) for start in starts]
    assert batch.inputs.tolist() == [window[:-1].tolist() for window in windows]
    assert batch.targets[:3].tolist() == [window[1:].tolist() for window in windows[:3]]
    assert batch.targets[3].tolist() == [IGNORE_INDEX] * 8
    # The checksum leaves out the padding, and is a sum, so that processes can add theirs.
    assert batch.checksum() == sum(zlib.crc32(window.tobytes()) for window in windows[:3])
    parts = [micro_batch_at(stream, order, sample=sample, rows=1) for sample in (5, 6, 7)]
    assert batch.checksum() == sum(part.checksum() for part in parts)
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs[:3])
