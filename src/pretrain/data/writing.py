"""Ids -> files: `PartWriter` writes those of one part of the corpus, `ShardWriter` joins parts to a
stream.

A stream is EOT document EOT document EOT ...: it begins with one end-of-text token, so that every
token of text is a target once. Nothing of it is held in memory but a checksum for each block.
Refused are ids outside the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.documents import Document
from pretrain.data.manifest import FORMAT_VERSION, SourceShare, SplitName, StreamInfo
from pretrain.data.origins import Origin

BLOCK_BYTES = 1 << 20
"""Ids in a block that has a checksum of its own, in bytes."""

# magic, format version, bytes per id, number of ids; then zeros up to 64 bytes, so that ids are
# aligned.
HEADER = struct.Struct("<8sIIQ40x")
MAGIC = b"PTSHARD\0"

LENGTH = np.dtype([("tokens", "<i8"), ("bytes", "<i8")])
"""Of a document: its ids, end-of-text included, and the bytes of its text."""


def id_bytes(vocab_size: int) -> int:
    """Bytes that an id takes on disk: 2 up to 65,536 entries, else 4."""
    return 2 if vocab_size <= 1 << 16 else 4


class PartWriter:
    """The ids of some documents, as files NAME.ids, NAME.lengths, NAME.documents.jsonl: `add` ids
    of a document in one or more calls, then `end_document`; at last `close`."""

    def __init__(self, folder: Path, *, name: SplitName, vocab_size: int, end_of_text: int) -> None:
        self._vocab_size = vocab_size
        self._end_of_text = np.array([end_of_text], dtype=np.int64)
        self._dtype = np.dtype(f"<u{id_bytes(vocab_size)}")
        self._files = [open(path, "xb") for path in part_files(folder, name)]  # noqa: SIM115
        self._n_tokens = 0

    def add(self, ids: NDArray[np.int64]) -> None:
        """Append ids, shape (n,). ValueError for an id out of range."""
        self._n_tokens += ids.size
        if ids.size == 0:
            return
        # Checked before the cast: numpy would wrap 65537 to 1 without a word.
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} cannot be stored; legal: 0 to {self._vocab_size - 1}")
        self._files[0].write(ids.astype(self._dtype).tobytes())

    def end_document(self, document: Document, *, n_bytes: int) -> int:
        """Close a document, of which the ids stand for `n_bytes` bytes of text, with the
        end-of-text token; returns its tokens without that."""
        n_tokens = self._n_tokens
        self.add(self._end_of_text)
        self._files[1].write(np.array([(n_tokens + 1, n_bytes)], LENGTH).tobytes())
        origin = Origin(document.id, document.source, document.offset, document.title)
        self._files[2].write(json.dumps(asdict(origin), ensure_ascii=False).encode() + b"\n")
        self._n_tokens = 0
        return n_tokens

    def close(self) -> None:
        for file in self._files:
            file.close()


def part_files(folder: Path, name: SplitName) -> list[Path]:
    """The files of a `PartWriter`: ids, lengths, origins."""
    return [folder / f"{name}.{what}" for what in ("ids", "lengths", "documents.jsonl")]


class ShardWriter:
    """Joins parts to one stream: `append` each in order, then `close`."""

    def __init__(self, folder: Path, *, name: SplitName, vocab_size: int, end_of_text: int) -> None:
        self._name = name
        self._dtype = np.dtype(f"<u{id_bytes(vocab_size)}")
        files = [f"{name}.bin", f"{name}.offsets", f"{name}.documents.jsonl"]
        with ExitStack() as opened:
            self._files: list[BinaryIO] = [
                opened.enter_context(open(folder / file, "xb")) for file in files
            ]
            self._opened = opened.pop_all()
        self._hashes = [hashlib.sha256() for _ in files]
        self._files[0].write(HEADER.pack(MAGIC, FORMAT_VERSION, self._dtype.itemsize, 0))
        self._block = bytearray(np.array([end_of_text], self._dtype).tobytes())
        self._checksums: list[int] = []
        self._n_tokens, self._n_bytes, self._max_id = 1, 0, end_of_text
        self._write(1, np.array([1], "<i8").tobytes())
        self._sources: list[SourceShare] = []
        self.n_documents = 0

    def append(self, folder: Path, *, source: str) -> None:
        """Add the documents of one part, all of them of the given `source`."""
        ids, lengths, origins = part_files(folder, self._name)
        found = np.fromfile(lengths, LENGTH)
        n_tokens, n_bytes = int(found["tokens"].sum()), int(found["bytes"].sum())
        for chunk in _chunks(ids):
            self._max_id = max(self._max_id, int(np.frombuffer(chunk, self._dtype).max()))
            self._block += chunk
            while len(self._block) >= BLOCK_BYTES:
                self._flush_block(BLOCK_BYTES)
        self._write(1, (self._n_tokens + np.cumsum(found["tokens"])).astype("<i8").tobytes())
        for chunk in _chunks(origins):
            self._write(2, chunk)
        if not self._sources or self._sources[-1].source != source:
            self._sources.append(SourceShare(source=source))
        share = self._sources[-1]
        share.n_documents += len(found)
        share.n_tokens += n_tokens
        share.n_bytes += n_bytes
        self.n_documents += len(found)
        self._n_tokens += n_tokens
        self._n_bytes += n_bytes

    def close(self) -> StreamInfo:
        """Write the rest and the header to the disk itself; returns what the manifest has to
        say."""
        if self._block:
            self._flush_block(len(self._block))
        self._files[0].seek(0)
        header = HEADER.pack(MAGIC, FORMAT_VERSION, self._dtype.itemsize, self._n_tokens)
        self._files[0].write(header)
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        ids, offsets, documents = (found.hexdigest() for found in self._hashes)
        return StreamInfo(
            file=f"{self._name}.bin",
            offsets_file=f"{self._name}.offsets",
            documents_file=f"{self._name}.documents.jsonl",
            n_tokens=self._n_tokens,
            n_documents=self.n_documents,
            n_bytes=self._n_bytes,
            max_id=self._max_id,
            sha256=ids,
            offsets_sha256=offsets,
            documents_sha256=documents,
            sources=self._sources,
            block_bytes=BLOCK_BYTES,
            block_checksums=self._checksums,
        )

    def abandon(self) -> None:
        """Close the files without finishing them."""
        self._opened.close()

    def _flush_block(self, size: int) -> None:
        block = bytes(self._block[:size])
        del self._block[:size]
        self._write(0, block)
        self._checksums.append(zlib.crc32(block))

    def _write(self, number: int, data: bytes) -> None:
        self._files[number].write(data)
        self._hashes[number].update(data)


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(BLOCK_BYTES):
            yield chunk
