"""Prepared text on disk: a folder of two streams of ids, which says about itself all that a reader
must know.

`writing` makes it, and ids come out of `open_prepared(folder).split("train").read(start, stop)`.
Refused are ids outside the vocabulary, files of the wrong size or kind, and a tokenizer that is not
the one that wrote the ids; `verify` reads everything and names the block that differs.
"""

from __future__ import annotations

import hashlib
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pretrain.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    SourceShare,
    SplitName,
    StreamInfo,
    read_manifest,
    size_of,
)
from pretrain.data.order import MixtureOrder, Order
from pretrain.data.origins import Origin, find_origins
from pretrain.data.writing import HEADER, MAGIC, id_bytes
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer


class TokenStream:
    """One opened stream of ids; nothing of it is held in memory."""

    def __init__(self, folder: Path, info: StreamInfo, *, vocab_size: int) -> None:
        """Open and check kind, size and range; ValueError with the file's name where something is
        off."""
        self._path = folder / info.file
        self._info = info
        self._vocab_size = vocab_size
        self._dtype = np.dtype(f"<u{id_bytes(vocab_size)}")
        self._check_file()
        self._check_offsets_size(folder / info.offsets_file)
        self._offsets_path = folder / info.offsets_file
        self.documents_path = folder / info.documents_file
        # Not a memory map: what was read of one counts as this process's memory, a window of 512
        # bytes makes the disk read 100 kB around it, and a file that was cut off kills with SIGBUS.
        self._file: BinaryIO = open(self._path, "rb", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    @property
    def n_tokens(self) -> int:
        """Number of ids, end-of-text tokens included."""
        return self._info.n_tokens

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return self._info.n_documents

    @property
    def n_bytes(self) -> int:
        """Bytes of text (UTF-8) behind the stream; end-of-text tokens count 0."""
        return self._info.n_bytes

    @property
    def sources(self) -> list[SourceShare]:
        """What each source gave, one after the other in the order of the stream."""
        return self._info.sources

    @property
    def sha256(self) -> str:
        """Hash of the ids as they lie in the file."""
        return self._info.sha256

    @property
    def document_offsets(self) -> NDArray[np.int64]:
        """Shape (n_documents + 1,): document d is ids [o[d], o[d + 1]), its closing end-of-text
        included."""
        return np.fromfile(self._offsets_path, dtype="<i8").astype(np.int64)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids [start, stop), shape (stop - start,), int64. ValueError for a range outside the
        stream."""
        if not 0 <= start <= stop <= self._info.n_tokens:
            raise ValueError(
                f"{self._path}: cannot read ids {start} to {stop}; legal: 0 to "
                f"{self._info.n_tokens}"
            )
        width = self._dtype.itemsize
        first, n_bytes = HEADER.size + start * width, (stop - start) * width
        stored = _read_at(self._file, first, n_bytes)
        if len(stored) < n_bytes:
            raise ValueError(
                f"{self._path}: ends at byte {first + len(stored):,}: the file was cut off after "
                "it was opened; prepare the data again"
            )
        ids = np.frombuffer(stored, self._dtype).astype(np.int64)
        if ids.size and ids.max() >= self._vocab_size:
            place = start + int(ids.argmax())
            raise ValueError(
                f"{self._path}: id {int(ids.max())} at {place} is outside the vocabulary of "
                f"{self._vocab_size}: the "
                "file is damaged; prepare the data again"
            )
        return ids

    def origins(self, wanted: Callable[[int, Origin], bool]) -> Iterator[tuple[int, Origin]]:
        """Number and origin of each document that is `wanted`, in the order of the stream."""
        return find_origins(self.documents_path, wanted)

    def verify(self) -> None:
        """Read the whole stream and compare every checksum; ValueError names the file and the
        block."""
        whole = hashlib.sha256()
        with open(self._path, "rb") as file:
            file.seek(HEADER.size)
            for number, expected in enumerate(self._info.block_checksums):
                block = file.read(self._info.block_bytes)
                whole.update(block)
                if zlib.crc32(block) != expected:
                    start = HEADER.size + number * self._info.block_bytes
                    raise ValueError(
                        f"{self._path}: block {number} (bytes {start} to {start + len(block)}) "
                        "is damaged: CRC-32 "
                        f"{zlib.crc32(block):08x}, expected {expected:08x}; prepare the data again"
                    )
        if whole.hexdigest() != self._info.sha256:
            raise ValueError(
                f"{self._path}: the ids are not those of the manifest (sha256 differs)"
            )
        for path, expected_sha256 in (
            (self._offsets_path, self._info.offsets_sha256),
            (self.documents_path, self._info.documents_sha256),
        ):
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected_sha256:
                    raise ValueError(f"{path}: damaged (sha256 differs); prepare the data again")

    def _check_file(self) -> None:
        n_bytes = size_of(self._path)
        expected = HEADER.size + self._info.n_tokens * self._dtype.itemsize
        if n_bytes != expected:
            raise ValueError(
                f"{self._path}: has {n_bytes:,} bytes, expected {expected:,}: the file is "
                f"{'cut off' if n_bytes < expected else 'too long'}; prepare the data again"
            )
        with open(self._path, "rb") as file:
            magic, version, width, count = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC:
            raise ValueError(f"{self._path}: no shard of pretrain (it begins with {magic!r})")
        for name, value, wanted in (
            ("format version", version, FORMAT_VERSION),
            ("bytes per id", width, self._dtype.itemsize),
            ("number of ids", count, self._info.n_tokens),
        ):
            if value != wanted:
                raise ValueError(f"{self._path}: {name} is {value}, expected {wanted}")
        n_blocks = -(-(expected - HEADER.size) // self._info.block_bytes)
        if len(self._info.block_checksums) != n_blocks:
            raise ValueError(
                f"{self._path}: manifest has {len(self._info.block_checksums)} checksums, "
                f"expected {n_blocks}"
            )
        if self._info.max_id >= self._vocab_size:
            raise ValueError(
                f"{self._path}: holds id {self._info.max_id}, but the vocabulary has only "
                f"{self._vocab_size} entries"
            )

    def _check_offsets_size(self, path: Path) -> None:
        n_bytes, expected = size_of(path), 8 * (self._info.n_documents + 1)
        if n_bytes != expected:
            raise ValueError(f"{path}: has {n_bytes:,} bytes, expected {expected:,}")


def _read_at(file: BinaryIO, position: int, n_bytes: int) -> bytes:
    """The bytes from there on, fewer where the file ends. Threads and forked processes may share
    the file where a system reads by position, which Windows does not."""
    parts = []
    while n_bytes:  # a read may return less than it was asked for
        if hasattr(os, "pread"):
            part = os.pread(file.fileno(), n_bytes, position)
        else:
            file.seek(position)
            part = file.read(n_bytes)
        if not part:
            break
        parts.append(part)
        position, n_bytes = position + len(part), n_bytes - len(part)
    return b"".join(parts)


class PreparedData:
    """An opened prepared folder."""

    _tokenizer: Tokenizer | None = None

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._streams: Mapping[str, TokenStream] = {
            name: TokenStream(folder, info, vocab_size=manifest.vocab_size)
            for name, info in manifest.streams.items()
        }

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the ids; the same object each time."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder / "tokenizer")
        n = self._tokenizer.vocab_size
        if n != self.manifest.vocab_size:
            raise ValueError(
                f"{self.folder}: the tokenizer has {n} entries, the manifest says "
                f"{self.manifest.vocab_size}"
            )
        return self._tokenizer

    def split(self, name: SplitName) -> TokenStream:
        """The stream "train" or "val"."""
        if name not in self._streams:
            raise ValueError(f"there is no split {name!r}; legal: {', '.join(self._streams)}")
        return self._streams[name]

    @property
    def min_source_tokens(self) -> int:
        """Ids of the shortest text that windows are cut from."""
        return self._streams["train"].n_tokens

    def order(
        self, *, context_length: int, seed: int, steps: int = 1, batch_size: int = 1
    ) -> Order | MixtureOrder:
        """The order in which a run visits the training text."""
        return Order(self._streams["train"].n_tokens, context_length, seed)

    def verify(self) -> None:
        """Read everything and compare every checksum; ValueError names what differs."""
        for stream in self._streams.values():
            stream.verify()


def open_prepared(folder: str | Path) -> PreparedData:
    """Open a prepared folder and check everything that can be checked without reading the ids.

    Raises ValueError naming the file where it is missing, cut off, of another kind, or contradicts
    the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST_NAME)
    file = folder / "tokenizer" / "tokenizer.json"
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    if found != manifest.tokenizer_sha256:
        raise ValueError(
            f"{file}: is not the tokenizer that wrote these ids (sha256 {found[:12]}, expected "
            f"{manifest.tokenizer_sha256[:12]}); prepare the data again"
        )
    return PreparedData(folder, manifest)
