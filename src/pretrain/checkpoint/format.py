"""The bytes of a checkpoint: a manifest in JSON, and tensors in files of the safetensors layout.

The manifest lists every tensor by its global name with its shape, its dtype and its slices: which
file, at which byte, and which box of the whole tensor the slice covers. One process writes one
slice of each tensor, many write many, and a reader need not know how many there were. Every 4 MiB
block of a file has its SHA-256 in the manifest, so that a reader verifies exactly what it reads. No
pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.fileio import NewFile

FORMAT, VERSION = "pretrain checkpoint", 1
MANIFEST = "manifest.json"

# Names as in the safetensors format.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

BLOCK_BYTES = 4 << 20

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a whole tensor of `shape` lies what one process holds of it."""

    shape: tuple[int, ...]
    box: Box


@dataclass(frozen=True, slots=True)
class Slice:
    """A box of a tensor, row-major and without gaps, from byte `offset` of `file`."""

    file: str
    offset: int
    box: Box


def whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, n) for n in shape)


def manifest_hash(content: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in content.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class HashingFile(NewFile):
    """A new file whose blocks are hashed while they are written, so nothing is read back."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.n_bytes = 0
        self.hashes: list[str] = []
        self._block = hashlib.sha256()
        self._block_filled = 0

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data)
        while rest:
            part = rest[: BLOCK_BYTES - self._block_filled]
            super().write(part)
            self._block.update(part)
            self._block_filled += len(part)
            if self._block_filled == BLOCK_BYTES:
                self._end_block()
            rest = rest[len(part) :]
        self.n_bytes += len(data)
        return len(data)

    def close(self) -> None:
        if self._block_filled:
            self._end_block()
        super().close()

    def _end_block(self) -> None:
        self.hashes.append(self._block.hexdigest())
        self._block = hashlib.sha256()
        self._block_filled = 0


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], boxes: Mapping[str, Box] | None = None
) -> tuple[dict[str, Any], list[Slice]]:
    """Write one safetensors file; returns its entry for the manifest and each tensor's slice, in
    order: all of it, but of those named in `boxes`, of which it is this box."""
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    base = 8 + len(text)
    with HashingFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_raw_bytes(tensor))
    entry = {"bytes": file.n_bytes, "block_bytes": BLOCK_BYTES, "sha256": file.hashes}
    slices = [
        Slice(
            path.name,
            base + header[name]["data_offsets"][0],
            (boxes or {}).get(name) or whole(tuple(tensor.shape)),
        )
        for name, tensor in tensors.items()
    ]
    return entry, slices
