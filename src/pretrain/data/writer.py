"""Ids -> files: a `TaskWriter` writes the ids of some documents, a `StreamWriter` joins them.

A stream is EOT document EOT document EOT ...: it begins with one end-of-text token, so every token
of text is a target once. Only a checksum of each block is kept in memory. ValueError for ids
outside the vocabulary.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.documents import Document
from pretrain.data.format import (
    FORMAT_VERSION,
    HEADER,
    MAGIC,
    Origin,
    SourceShare,
    SplitName,
    StreamInfo,
    id_bytes,
)

BLOCK_BYTES = 1 << 20
"""Bytes of ids that have a checksum of their own."""

LENGTH = np.dtype([("tokens", "<i8"), ("bytes", "<i8")])
"""Of a document: its ids, with end-of-text, and the bytes of its text."""

N_OUTLIERS = 10
# The ratio of bytes to tokens of a shorter document says nothing.
_MIN_OUTLIER_BYTES = 64


def task_files(folder: Path, name: SplitName) -> list[Path]:
    """The files of a `TaskWriter`: ids, lengths, origins."""
    return [folder / f"{name}.{suffix}" for suffix in ("ids", "lengths", "documents.jsonl")]


class TaskWriter:
    """Writes the ids of some documents: `add` ids of a document in one or more calls, then
    `end_document`; at last `close`."""

    def __init__(self, folder: Path, *, name: SplitName, vocab_size: int, end_of_text: int) -> None:
        self._vocab_size = vocab_size
        self._end_of_text = np.array([end_of_text], dtype=np.int64)
        self._dtype = np.dtype(f"<u{id_bytes(vocab_size)}")
        self._files = [open(path, "xb") for path in task_files(folder, name)]  # noqa: SIM115
        self._n_tokens = 0

    def add(self, ids: NDArray[np.int64]) -> None:
        """Append ids, shape (n,). ValueError for an id out of range."""
        self._n_tokens += ids.size
        if ids.size == 0:
            return
        # Checked before the cast: numpy would silently wrap 65537 to 1.
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id must be 0 to {self._vocab_size - 1} (got {bad})")
        self._files[0].write(ids.astype(self._dtype).tobytes())

    def end_document(self, document: Document, *, n_bytes: int) -> int:
        """Close a document of `n_bytes` bytes of text with the end-of-text token; returns its
        number of tokens without that."""
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


class StreamWriter:
    """Joins the files of `TaskWriter`s to one stream: `append` each in order, then `close`."""

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
        # The number of ids is filled in at the end.
        self._files[0].write(HEADER.pack(MAGIC, FORMAT_VERSION, self._dtype.itemsize, 0))
        self._block = bytearray(np.array([end_of_text], self._dtype).tobytes())
        self._checksums: list[int] = []
        self._n_tokens = 1
        self._n_bytes = 0
        self._max_id = end_of_text
        self._write(1, np.array([1], "<i8").tobytes())
        self._sources: list[SourceShare] = []
        self.n_documents = 0

    def append(self, folder: Path, *, source: str) -> None:
        """Add the documents that a `TaskWriter` wrote to `folder`, all of the given `source`."""
        ids, lengths_path, origins = task_files(folder, self._name)
        lengths = np.fromfile(lengths_path, LENGTH)
        n_tokens, n_bytes = int(lengths["tokens"].sum()), int(lengths["bytes"].sum())
        for chunk in _chunks(ids):
            self._max_id = max(self._max_id, int(np.frombuffer(chunk, self._dtype).max()))
            self._block += chunk
            while len(self._block) >= BLOCK_BYTES:
                self._flush_block(BLOCK_BYTES)
        self._write(1, (self._n_tokens + np.cumsum(lengths["tokens"])).astype("<i8").tobytes())
        for chunk in _chunks(origins):
            self._write(2, chunk)
        if not self._sources or self._sources[-1].source != source:
            self._sources.append(SourceShare(source=source))
        share = self._sources[-1]
        share.n_documents += len(lengths)
        share.n_tokens += n_tokens
        share.n_bytes += n_bytes
        self.n_documents += len(lengths)
        self._n_tokens += n_tokens
        self._n_bytes += n_bytes

    def close(self) -> StreamInfo:
        """Write the last block and the header to the disk itself; returns the manifest's record of
        the stream."""
        if self._block:
            self._flush_block(len(self._block))
        self._files[0].seek(0)
        header = HEADER.pack(MAGIC, FORMAT_VERSION, self._dtype.itemsize, self._n_tokens)
        self._files[0].write(header)
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        ids_hash, offsets_hash, documents_hash = (each.hexdigest() for each in self._hashes)
        return StreamInfo(
            file=f"{self._name}.bin",
            offsets_file=f"{self._name}.offsets",
            documents_file=f"{self._name}.documents.jsonl",
            n_tokens=self._n_tokens,
            n_documents=self.n_documents,
            n_bytes=self._n_bytes,
            max_id=self._max_id,
            sha256=ids_hash,
            offsets_sha256=offsets_hash,
            documents_sha256=documents_hash,
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


class CompressionOutliers:
    """Finds the documents whose bytes per token differ most from the mean, in constant memory.

    Many tokens for few bytes are text that the tokenizer was not trained on: another language,
    noise, base64. Few tokens for many bytes are repetition.
    """

    def __init__(self) -> None:
        self._n_tokens = self._n_bytes = self._n_seen = 0
        # Heaps of (log ratio or its negative, -number of the document, record): the documents with
        # the most and with the fewest bytes per token so far. Which of them are the outliers
        # depends on the final mean.
        self._most: list[tuple[float, int, dict[str, Any]]] = []
        self._fewest: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, document: Document, *, n_tokens: int, n_bytes: int) -> None:
        """Add one document of `n_tokens` ids and `n_bytes` bytes of text."""
        self._n_seen += 1
        self._n_tokens += n_tokens
        self._n_bytes += n_bytes
        if n_bytes < _MIN_OUTLIER_BYTES or n_tokens == 0:
            return
        ratio = math.log(n_bytes / n_tokens)
        is_full = len(self._most) == N_OUTLIERS
        if is_full and ratio <= self._most[0][0] and -ratio <= self._fewest[0][0]:
            return
        record = {
            "id": document.id,
            "file": document.source,
            "offset": document.offset,
            "n_bytes": n_bytes,
            "bytes_per_token": round(n_bytes / n_tokens, 3),
            "begins": document.text[:80],
        }
        _push(self._most, (ratio, -self._n_seen, record))
        _push(self._fewest, (-ratio, -self._n_seen, record))

    def state(self) -> dict[str, Any]:
        """All numbers and records as plain values for JSON."""
        names = ("_n_tokens", "_n_bytes", "_n_seen", "_most", "_fewest")
        return {name: getattr(self, name) for name in names}

    def merge(self, state: dict[str, Any]) -> None:
        """Add the `state` of another object, as if its documents came after the ones here."""
        for heap, items in ((self._most, state["_most"]), (self._fewest, state["_fewest"])):
            for key, number, record in sorted(items, key=lambda item: -item[1]):
                _push(heap, (key, number - self._n_seen, record))
        self._n_tokens += state["_n_tokens"]
        self._n_bytes += state["_n_bytes"]
        self._n_seen += state["_n_seen"]

    def records(self) -> list[dict[str, Any]]:
        """The outliers, furthest from the mean first."""
        if not self._most:
            return []
        mean = math.log(self._n_bytes / self._n_tokens)
        # By number: if there are few documents, one may be in both heaps.
        distances: dict[int, tuple[float, dict[str, Any]]] = {}
        for ratio, number, record in self._most:
            distances[-number] = (abs(ratio - mean), record)
        for negative_ratio, number, record in self._fewest:
            distances[-number] = (abs(-negative_ratio - mean), record)
        ordered = sorted(distances.items(), key=lambda item: (-item[1][0], item[0]))
        # With bytes as tokens every distance is 0.
        return [record for _, (distance, record) in ordered[:N_OUTLIERS] if distance > 0]


def _push(
    heap: list[tuple[float, int, dict[str, Any]]], item: tuple[float, int, dict[str, Any]]
) -> None:
    """Keep the N_OUTLIERS largest items."""
    if len(heap) < N_OUTLIERS:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)
