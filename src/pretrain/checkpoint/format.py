"""The bytes of a checkpoint: a manifest in JSON, and tensors in files of the safetensors layout.

The manifest lists every tensor by its global name with its shape, its dtype and its slices: which
file, at which byte, and which part of the full tensor the slice covers. One process writes one
slice of each tensor, many write many, and a reader need not know how many there were. Every 4 MiB
block of a file has its SHA-256 in the manifest, so that a reader verifies exactly what it reads. No
pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.fileio import NewFile, read_json

FORMAT, VERSION = "pretrain checkpoint", 1
MANIFEST = "manifest.json"
BLOCK_BYTES = 4 << 20

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

ShardSlice = tuple[tuple[int, int], ...]
"""A part of a full tensor: (start, stop) of each dim."""


class DamagedCheckpoint(ValueError):
    """The bytes on the disk are not the ones that were written; the message names file and
    place."""


@dataclass(frozen=True, slots=True)
class TensorShard:
    """Which part of a full tensor of `shape` one process has."""

    shape: tuple[int, ...]
    bounds: ShardSlice


def full_slice(shape: tuple[int, ...]) -> ShardSlice:
    """The slice that is the full tensor."""
    return tuple((0, n) for n in shape)


class HashingFile(NewFile):
    """A new file whose blocks are hashed while they are written, so nothing is read back."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.n_bytes = 0
        self.hashes: list[str] = []
        """the SHA-256 of each block, once the file is closed"""
        self._blocks: list[Any] = []

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data)
        while rest:
            n_filled = self.n_bytes % BLOCK_BYTES
            if not n_filled:
                self._blocks.append(hashlib.sha256())
            part = rest[: BLOCK_BYTES - n_filled]
            super().write(part)
            self._blocks[-1].update(part)
            self.n_bytes += len(part)
            rest = rest[len(part) :]
        return len(data)

    def close(self) -> None:
        self.hashes = [block.hexdigest() for block in self._blocks]
        super().close()


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    shards: Mapping[str, TensorShard] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Write one safetensors file; returns the manifest's records of it and of each tensor, with its
    slice: row-major and without gaps. Tensors named in `shards` are parts of larger ones."""
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
    start: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    text = json.dumps(start | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with HashingFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            dense = tensor.detach().cpu().contiguous()
            # The strides of a dim of size 1 may be anything; torch views bytes only where it is 1.
            flat = dense.as_strided((dense.numel(),), (1,))
            file.write(flat.view(torch.uint8).numpy().data)
    records = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        shard = (shards or {}).get(name) or TensorShard(shape, full_slice(shape))
        place = 8 + len(text) + header[name]["data_offsets"][0]
        records[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(shard.shape),
            "slices": [{"file": path.name, "offset": place, "box": shard.bounds}],
        }
    return {"bytes": file.n_bytes, "block_bytes": BLOCK_BYTES, "sha256": file.hashes}, records


def manifest_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without the hash that it contains."""
    text = json.dumps({k: v for k, v in content.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check the manifest of the checkpoint at `path`. DamagedCheckpoint if it is missing
    or was changed; ValueError for a newer version."""
    file = path / MANIFEST
    try:
        content = read_json(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedCheckpoint(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from None
    if content.get("format") != FORMAT:
        message = f"{file} has the format {content.get('format')!r}; it must be {FORMAT!r}"
        raise DamagedCheckpoint(message)
    if content.get("sha256") != manifest_hash(content):
        raise DamagedCheckpoint(f"{file} was changed after it was written: its SHA-256 differs")
    version = content.get("version")
    if type(version) is int and version > VERSION:
        raise ValueError(
            f"{path} has format version {version}; this program reads versions up to {VERSION}: "
            "use a newer pretrain"
        )
    try:
        for is_met, requirement in _manifest_requirements(content):
            if not is_met:
                raise ValueError(requirement)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise DamagedCheckpoint(f"{file} is damaged: {reason}") from None
    return content


def _manifest_requirements(content: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield pairs (is met, requirement). They reject a manifest with a right hash that was not
    written here: no file outside the folder is read, and no byte without a hash."""

    def is_count(value: Any) -> bool:
        return type(value) is int and value >= 0

    yield type(content["version"]) is int, "version must be an integer"
    yield type(content["step"]) is int, "step must be an integer"
    yield isinstance(content["state"], dict), "state must be an object"
    for name, entry in content["files"].items():
        n_bytes, block_bytes, n_hashes = entry["bytes"], entry["block_bytes"], len(entry["sha256"])
        yield (
            is_count(n_bytes) and is_count(block_bytes) and block_bytes > 0,
            f"{name}: bytes and block_bytes must be counts (got {n_bytes} and {block_bytes})",
        )
        yield (
            Path(name).name == name and name != MANIFEST,
            f"{name} must be the name of a file of tensors in this folder",
        )
        yield (
            (n_hashes - 1) * block_bytes < n_bytes <= n_hashes * block_bytes,
            f"{name} must have one hash for each block (got {n_hashes} hashes)",
        )
    for name, entry in content["tensors"].items():
        shape = entry["shape"]
        dtype = entry["dtype"]
        yield dtype in DTYPES, f"{name}: dtype must be one of {', '.join(DTYPES)} (got {dtype})"
        yield all(map(is_count, shape)), f"{name}: shape must be a list of counts (got {shape})"
        for piece in entry["slices"]:
            bounds = piece["box"]
            yield piece["file"] in content["files"], f"{name}: {piece['file']} must be listed"
            yield is_count(piece["offset"]), f"{name}: offset must be a count"
            yield (
                [len(pair) for pair in bounds] == [2] * len(shape)
                and all(is_count(n) for pair in bounds for n in pair),
                f"{name}: each slice must have a start and a stop for each dim (got {bounds})",
            )
