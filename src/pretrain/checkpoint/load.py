"""Files -> state: find checkpoints, read any part of any tensor, and verify every byte that is
returned."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import secrets
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pretrain.checkpoint.format import (
    DTYPES,
    DamagedCheckpoint,
    ShardSlice,
    full_slice,
    read_manifest,
)

_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


class Checkpoint:
    """An open checkpoint: `step`, `state`, `sha256` of its manifest, `shape`, `read`.

    Its files stay open, so a reader can continue when a run deletes the checkpoint meanwhile.
    DamagedCheckpoint for a wrong manifest, and for a missing or truncated file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_manifest(path)
        self.step: int = content["step"]
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) != self.step:
            raise DamagedCheckpoint(
                f"{path} has the state of step {self.step}; its name must be "
                f"{checkpoint_name(self.step)}: rename it"
            )
        self.state: dict[str, Any] = content["state"]
        self.sha256: str = content["sha256"]
        self._files: dict[str, Any] = content["files"]
        self._tensors: dict[str, Any] = content["tensors"]
        self._verified: set[tuple[str, int]] = set()
        self._opened: dict[str, BinaryIO] = {}
        with ExitStack() as opened:
            for name, entry in self._files.items():
                try:
                    file = self._opened[name] = opened.enter_context(open(path / name, "rb"))
                except (FileNotFoundError, IsADirectoryError):
                    message = f"{path / name} is missing; it must have {entry['bytes']:,} bytes"
                    raise DamagedCheckpoint(message) from None
                n_bytes = os.fstat(file.fileno()).st_size
                if n_bytes != entry["bytes"]:
                    raise DamagedCheckpoint(
                        f"{path / name} has {n_bytes:,} bytes; it must have {entry['bytes']:,}"
                    )
            self.close = weakref.finalize(self, opened.pop_all().close)

    def names(self, group: str) -> list[str]:
        """Names of the tensors of one group (`model`, `optimizer`), without the name of the
        group."""
        return [n.partition("/")[2] for n in self._tensors if n.startswith(f"{group}/")]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the full tensor."""
        return tuple(self._tensors[name]["shape"])

    def read(self, name: str, bounds: ShardSlice | None = None) -> Tensor:
        """Read one tensor, or the part `bounds` of it, to the CPU; nothing else is read.

        Raises DamagedCheckpoint if a byte that was read is not the byte that was written.
        """
        if name not in self._tensors:
            raise DamagedCheckpoint(
                f"{self.path} has no tensor {name!r}; it must have all tensors of the model"
            )
        entry = self._tensors[name]
        bounds = full_slice(self.shape(name)) if bounds is None else bounds
        result = torch.empty([stop - start for start, stop in bounds], dtype=DTYPES[entry["dtype"]])
        n_filled = 0
        for stored in entry["slices"]:
            common = tuple(
                (max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, stored["box"], strict=True)
            )
            if any(start >= stop for start, stop in common):
                continue
            values = self._read_slice(stored, common, result.dtype)
            result[_relative(common, bounds)] = values
            n_filled += values.numel()
        if n_filled != result.numel():
            raise DamagedCheckpoint(
                f"{self.path} is damaged: the slices of {name!r} must cover its {result.numel():,} "
                f"numbers (got {n_filled:,})"
            )
        return result

    def _read_slice(self, stored: dict[str, Any], part: ShardSlice, dtype: torch.dtype) -> Tensor:
        """Read a part of a slice; of the file, only the rows (first dim) of that part."""
        file, offset, bounds = stored["file"], stored["offset"], stored["box"]
        shape = [stop - start for start, stop in bounds]
        if not shape:
            data = self._verified_bytes(file, offset, dtype.itemsize)
            return torch.frombuffer(data, dtype=dtype).reshape(())
        first_row, last_row = (row - bounds[0][0] for row in part[0])
        n_rows = last_row - first_row
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        data = self._verified_bytes(file, offset + first_row * row_bytes, n_rows * row_bytes)
        rows = torch.frombuffer(data, dtype=dtype).reshape([n_rows, *shape[1:]])
        return rows[(slice(None), *_relative(part[1:], bounds[1:]))]

    def _verified_bytes(self, name: str, start: int, n_bytes: int) -> bytearray:
        """Read bytes of a file, after the hashes of all blocks that they are in."""
        entry = self._files[name]
        block_bytes = entry["block_bytes"]
        if not 0 <= start <= start + n_bytes <= entry["bytes"]:
            raise DamagedCheckpoint(
                f"{self.path / name} has {entry['bytes']:,} bytes, but a tensor is at bytes "
                f"{start:,} to {start + n_bytes:,}: the manifest is damaged"
            )
        first_block = start // block_bytes
        end_block = (start + n_bytes + block_bytes - 1) // block_bytes
        file = self._opened[name]
        try:
            file.seek(first_block * block_bytes)
            data = bytearray(file.read((end_block - first_block) * block_bytes))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise DamagedCheckpoint(f"{self.path / name} cannot be read: {error}") from None
        for block in range(first_block, end_block):
            if (name, block) in self._verified:
                continue
            begin = (block - first_block) * block_bytes
            digest = hashlib.sha256(memoryview(data)[begin : begin + block_bytes]).hexdigest()
            if digest != entry["sha256"][block]:
                raise DamagedCheckpoint(
                    f"{self.path / name} was changed after it was written: the SHA-256 of the "
                    f"block at byte {block * block_bytes:,} differs"
                )
            self._verified.add((name, block))
        offset = start - first_block * block_bytes
        return data[offset : offset + n_bytes]

    def verify(self, *, rank: int | None = None) -> None:
        """Read and check every block of every file, or of those that process `rank` has written;
        raises DamagedCheckpoint at the first wrong one."""
        for name, entry in self._files.items():
            if rank is not None and not name.endswith(f"-{rank:05d}.safetensors"):
                continue
            for start in range(0, entry["bytes"], entry["block_bytes"]):
                length = min(entry["block_bytes"], entry["bytes"] - start)
                self._verified_bytes(name, start, length)


def _relative(part: ShardSlice, outer: Sequence[Sequence[int]]) -> tuple[slice, ...]:
    """The index of a part inside an outer slice that contains it."""
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(part, outer, strict=True)
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run by rising step. The order is that of the names; time stamps do
    not matter."""
    if not folder.is_dir():
        return []
    paths = [(int(m[1]), path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(paths)]


def newest_good(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint of the highest step of which every byte verifies, and the errors of newer
    ones.

    A damaged checkpoint is renamed, not deleted: somebody may want to look at it.
    """
    errors: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        checkpoint = None
        try:
            checkpoint = Checkpoint(path)
            checkpoint.verify()
            return checkpoint, errors
        except DamagedCheckpoint as error:
            if checkpoint is not None:
                checkpoint.close()  # on other systems than Linux an open file locks its folder
            errors.append(f"{error} (renamed to {quarantine(path).name})")
    return None, errors


def quarantine(path: Path) -> Path:
    """Give a damaged checkpoint a name that no reader looks for; returns the new path."""
    damaged = path.with_name(f"damaged-{path.name}-{secrets.token_hex(2)}")
    path.rename(damaged)
    return damaged
