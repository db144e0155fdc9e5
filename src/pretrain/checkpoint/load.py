"""Files -> state: finds checkpoints, reads any box of any tensor, and verifies every byte that it
hands out."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pretrain.checkpoint.format import (
    DTYPES,
    FORMAT,
    MANIFEST,
    VERSION,
    Box,
    Slice,
    manifest_hash,
    whole,
)

_NAME = re.compile(r"step-(\d{8,})")
# A manifest of a million tensors is some 200 MB; more is not ours.
_LARGEST_MANIFEST_BYTES = 1 << 28


class DamagedCheckpoint(ValueError):
    """What is on the disk is not what was written; the text names file and place."""


class Checkpoint:
    """An open checkpoint: `step`, `state`, `sha256` of its manifest, `shape`, `read`.

    Its files are held open, so a reader goes on where a run forgets the checkpoint meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = _read_manifest(path)
        self.step: int = content["step"]
        named = _NAME.fullmatch(path.name)
        if named and int(named[1]) != self.step:
            raise DamagedCheckpoint(f"{path} holds step {self.step}: it was renamed")
        self.state: dict[str, Any] = content["state"]
        self.sha256: str = content["sha256"]
        self._files: dict[str, Any] = content["files"]
        self._tensors: dict[str, Any] = content["tensors"]
        self._verified: set[tuple[str, int]] = set()
        with ExitStack() as opened:
            self._opened = {
                name: opened.enter_context(_open_whole(path / name, n_bytes=entry["bytes"]))
                for name, entry in self._files.items()
            }
            self.close = weakref.finalize(self, opened.pop_all().close)

    def names(self, group: str) -> list[str]:
        """Names of the tensors of one group (`model`, `optimizer`), without the group's own
        name."""
        return [n.partition("/")[2] for n in self._tensors if n.startswith(f"{group}/")]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """One tensor, or the `box` ((start, stop) a dim) of it, on the CPU; only what is asked for
        is read.

        Raises DamagedCheckpoint when a byte that was read is not the byte that was written.
        """
        if name not in self._tensors:
            raise DamagedCheckpoint(f"{self.path} has no tensor {name}")
        entry = self._tensors[name]
        box = whole(self.shape(name)) if box is None else box
        result = torch.empty([stop - start for start, stop in box], dtype=DTYPES[entry["dtype"]])
        filled = 0
        for raw in entry["slices"]:
            piece = Slice(raw["file"], raw["offset"], tuple((a, b) for a, b in raw["box"]))
            common = tuple(
                (max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece.box, strict=True)
            )
            if any(a >= b for a, b in common):
                continue
            part = self._read_piece(piece, common, result.dtype)
            place = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box, strict=True))
            result[place] = part
            filled += part.numel()
        if filled != result.numel():
            raise DamagedCheckpoint(f"{self.path}: the slices of {name} do not cover it")
        return result

    def _read_piece(self, piece: Slice, wanted: Box, dtype: torch.dtype) -> Tensor:
        """The part `wanted` of a slice; of the file, only the rows (first dim) that it spans are
        touched."""
        shape = [b - a for a, b in piece.box]
        if not shape:
            return torch.frombuffer(
                self._verified_bytes(piece.file, piece.offset, dtype.itemsize), dtype=dtype
            ).reshape(())
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        first, last = wanted[0][0] - piece.box[0][0], wanted[0][1] - piece.box[0][0]
        data = self._verified_bytes(
            piece.file, piece.offset + first * row_bytes, (last - first) * row_bytes
        )
        rows = torch.frombuffer(data, dtype=dtype).reshape([last - first, *shape[1:]])
        inner = tuple(
            slice(a - c, b - c) for (a, b), (c, _) in zip(wanted[1:], piece.box[1:], strict=True)
        )
        return rows[(slice(None), *inner)]

    def _verified_bytes(self, name: str, start: int, n_bytes: int) -> bytearray:
        entry = self._files[name]
        block_bytes = entry["block_bytes"]
        if not 0 <= start <= start + n_bytes <= entry["bytes"]:
            raise DamagedCheckpoint(f"{self.path / name}: a tensor lies outside the file")
        first, last = start // block_bytes, -(-(start + n_bytes) // block_bytes)
        file = self._opened[name]
        try:
            file.seek(first * block_bytes)
            data = bytearray(file.read((last - first) * block_bytes))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise DamagedCheckpoint(f"{self.path / name} cannot be read: {error}") from None
        for block in range(first, last):
            if (name, block) in self._verified:
                continue
            begin = (block - first) * block_bytes
            digest = hashlib.sha256(memoryview(data)[begin : begin + block_bytes]).hexdigest()
            if digest != entry["sha256"][block]:
                raise DamagedCheckpoint(
                    f"{self.path / name}: bytes {block * block_bytes:,} and following were changed "
                    f"after they were written"
                )
            self._verified.add((name, block))
        offset = start - first * block_bytes
        return data[offset : offset + n_bytes]

    def verify(self, *, rank: int | None = None) -> None:
        """Read and check every block of every file, or of those that the process `rank` has
        written; raises DamagedCheckpoint at the first wrong one."""
        for name, entry in self._files.items():
            if rank is not None and not name.endswith(f"-{rank:05d}.safetensors"):
                continue
            for start in range(0, entry["bytes"], entry["block_bytes"]):
                length = min(entry["block_bytes"], entry["bytes"] - start)
                self._verified_bytes(name, start, length)


def _open_whole(file: Path, *, n_bytes: int) -> BinaryIO:
    try:
        opened = open(file, "rb") if file.is_file() else None  # noqa: SIM115 - held open
    except FileNotFoundError:  # it went between the two
        opened = None
    size = None if opened is None else os.fstat(opened.fileno()).st_size
    if opened is not None and size == n_bytes:
        return opened
    if opened is not None:
        opened.close()
    found = "is missing" if size is None else f"has {size:,} bytes"
    raise DamagedCheckpoint(f"{file} {found}; {n_bytes:,} were written")


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        if file.stat().st_size > _LARGEST_MANIFEST_BYTES:
            raise DamagedCheckpoint(f"{file} is larger than any manifest of ours")
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedCheckpoint(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    except UnicodeDecodeError as error:
        raise DamagedCheckpoint(f"{file} is not JSON: {error}") from None
    try:
        content = json.loads(text, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{file} is not the manifest of a {FORMAT}")
    if content.get("sha256") != manifest_hash(content):
        raise DamagedCheckpoint(f"{file} was changed after it was written")
    version = content.get("version")
    if type(version) is int and version > VERSION:
        raise ValueError(
            f"{path} is in version {version} of the format and this program reads up to "
            f"{VERSION}; a newer pretrain can open it"
        )
    try:
        _refuse_nonsense(content)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        text = f"{type(error).__name__}: {error}"
        raise DamagedCheckpoint(f"{file} is not laid out as a manifest is: {text}") from None
    return content


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("it has a key twice")
    return content


def _refuse_nonsense(content: dict[str, Any]) -> None:
    """Some error where a manifest with a right hash, hence made on purpose, cannot be ours: nothing
    outside the folder is read for it, and nothing is read that it gives no hash of."""
    if type(content["version"]) is not int or type(content["step"]) is not int:
        raise ValueError("version or step is no number")
    if not isinstance(content["state"], dict):
        raise ValueError("state is no object")
    for name, entry in content["files"].items():
        n_bytes, block_bytes = entry["bytes"], entry["block_bytes"]
        if {type(n_bytes), type(block_bytes)} != {int} or min(n_bytes, block_bytes - 1) < 0:
            raise ValueError(f"{name} has a size of {n_bytes} in blocks of {block_bytes}")
        if Path(name).name != name or name == MANIFEST:
            raise ValueError(f"{name} is no file of its own in this folder")
        if len(entry["sha256"]) != -(-n_bytes // block_bytes):
            raise ValueError(f"{name} has {len(entry['sha256'])} hashes")
    for name, entry in content["tensors"].items():
        DTYPES[entry["dtype"]]
        for piece in entry["slices"]:
            content["files"][piece["file"]]
            numbers = [
                piece["offset"],
                *entry["shape"],
                *(n for pair in piece["box"] for n in pair),
            ]
            if any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"{name} has a place or a shape that is none")
            if [len(pair) for pair in piece["box"]] != [2] * len(entry["shape"]):
                raise ValueError(f"{name} has a slice of other dims")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open one checkpoint; raises DamagedCheckpoint for a wrong manifest, a missing or a cut
    file."""
    return Checkpoint(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run by rising step; order is by the step in the name, never by
    time."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest_good(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint of the highest step whose every byte verifies, and what was wrong with newer
    ones.

    A damaged checkpoint is set aside, not deleted: somebody may want to look at it.
    """
    complaints: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        checkpoint = None
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.verify()
        except DamagedCheckpoint as error:
            if checkpoint is not None:
                checkpoint.close()  # elsewhere than on Linux an open file keeps its folder's name
            complaints.append(f"{error} (set aside as {set_aside(path).name})")
            continue
        return checkpoint, complaints
    return None, complaints


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which nobody looks for one; returns that."""
    aside = path.with_name(f"damaged-{path.name}-{secrets.token_hex(2)}")
    path.rename(aside)
    return aside
