"""Ids -> files: a `TaskWriter` writes the ids of some documents, `join_stream` joins such files.

A stream is EOT document EOT document EOT ...: it begins with one end-of-text token, so every token
of text is a target once. Only a checksum of each block is kept in memory. ValueError for ids
outside the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.documents import Document
from pretrain.data.format import (
    FORMAT_VERSION,
    HEADER,
    MAGIC,
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
    """Writes the ids of some documents: `add` each, at last `close`."""

    def __init__(self, folder: Path, *, name: SplitName, vocab_size: int, end_of_text: int) -> None:
        self._vocab_size = vocab_size
        self._end_of_text = np.array([end_of_text], dtype=np.int64)
        self._dtype = np.dtype(f"<u{id_bytes(vocab_size)}")
        self._files = [open(path, "xb") for path in task_files(folder, name)]  # noqa: SIM115

    def add(self, document: Document, ids: Iterable[NDArray[np.int64]], *, n_bytes: int) -> int:
        """Append a document, or a part of one: the `ids` of `n_bytes` bytes of text, in arrays of
        shape (n,), and the end-of-text token; returns the number of `ids`.

        ValueError for an id out of range.
        """
        n_tokens = 0
        for chunk in chain(ids, [self._end_of_text]):
            n_tokens += chunk.size
            # Checked before the cast: numpy would silently wrap 65537 to 1.
            if chunk.size and not 0 <= chunk.min() <= chunk.max() < self._vocab_size:
                raise ValueError(
                    f"token ids must be in 0 to {self._vocab_size - 1} (got {chunk.min()} to "
                    f"{chunk.max()})"
                )
            self._files[0].write(chunk.astype(self._dtype).tobytes())
        self._files[1].write(np.array([(n_tokens, n_bytes)], LENGTH).tobytes())
        origin = document.place() | {"title": document.title}
        self._files[2].write(json.dumps(origin, ensure_ascii=False).encode() + b"\n")
        return n_tokens - 1

    def close(self) -> None:
        for file in self._files:
            file.close()


def join_stream(
    folder: Path,
    parts: Iterable[tuple[Path, str]],
    *,
    name: SplitName,
    vocab_size: int,
    end_of_text: int,
) -> StreamInfo:
    """Join the files of `TaskWriter`s to a stream in `folder`; returns the manifest's record of it.

    `parts` are the folders of the writers, each with the source of all its documents.
    """
    dtype = np.dtype(f"<u{id_bytes(vocab_size)}")
    names = (f"{name}.bin", f"{name}.offsets", f"{name}.documents.jsonl")
    hashes = [hashlib.sha256() for _ in names]
    checksums: list[int] = []
    sources: list[SourceShare] = []
    n_tokens, max_id = 1, end_of_text
    block = np.array([end_of_text], dtype).tobytes()
    with ExitStack() as opened:
        files = [opened.enter_context(open(folder / file, "xb")) for file in names]

        def write(number: int, data: bytes) -> None:
            files[number].write(data)
            hashes[number].update(data)

        # The number of ids is filled in at the end.
        files[0].write(HEADER.pack(MAGIC, FORMAT_VERSION, dtype.itemsize, 0))
        write(1, np.array([1], "<i8").tobytes())
        for part, source in parts:
            ids, lengths_path, origins = task_files(part, name)
            for chunk in file_chunks(ids):
                max_id = max(max_id, int(np.frombuffer(chunk, dtype).max()))
                block += chunk
                if len(block) >= BLOCK_BYTES:
                    write(0, block[:BLOCK_BYTES])
                    checksums.append(zlib.crc32(block[:BLOCK_BYTES]))
                    block = block[BLOCK_BYTES:]
            lengths = np.fromfile(lengths_path, LENGTH)
            write(1, (n_tokens + np.cumsum(lengths["tokens"])).astype("<i8").tobytes())
            for chunk in file_chunks(origins):
                write(2, chunk)
            if not sources or sources[-1].source != source:
                sources.append(SourceShare(source=source))
            share = sources[-1]
            share.n_documents += len(lengths)
            share.n_tokens += int(lengths["tokens"].sum())
            share.n_bytes += int(lengths["bytes"].sum())
            n_tokens += int(lengths["tokens"].sum())
        if block:
            write(0, block)
            checksums.append(zlib.crc32(block))
        files[0].seek(0)
        files[0].write(HEADER.pack(MAGIC, FORMAT_VERSION, dtype.itemsize, n_tokens))
    ids_hash, offsets_hash, documents_hash = (each.hexdigest() for each in hashes)
    return StreamInfo(
        file=names[0],
        offsets_file=names[1],
        documents_file=names[2],
        n_tokens=n_tokens,
        n_documents=sum(share.n_documents for share in sources),
        n_bytes=sum(share.n_bytes for share in sources),
        max_id=max_id,
        sha256=ids_hash,
        offsets_sha256=offsets_hash,
        documents_sha256=documents_hash,
        sources=tuple(sources),
        block_bytes=BLOCK_BYTES,
        block_checksums=checksums,
    )


def file_chunks(path: Path, n_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Yield the content of a file in pieces of `n_bytes`."""
    with open(path, "rb") as file:
        while chunk := file.read(n_bytes):
            yield chunk


# Documents whose bytes per token differ most from the mean. Many tokens for few bytes are text that
# the tokenizer was not trained on: another language, noise, base64. Few tokens for many bytes are
# repetition.

Compression = tuple[float, dict[str, Any]]
"""The logarithm of the bytes per token of a document, and its record for the report."""


def compression_of(document: Document, *, n_tokens: int, n_bytes: int) -> list[Compression]:
    """The compression of a document of `n_tokens` ids and `n_bytes` bytes of text; empty for one
    that is too short."""
    if n_bytes < _MIN_OUTLIER_BYTES or n_tokens == 0:
        return []
    record = document.place() | {
        "n_bytes": n_bytes,
        "bytes_per_token": round(n_bytes / n_tokens, 3),
        "begins": document.text[:80],
    }
    return [(math.log(n_bytes / n_tokens), record)]


def extremes(documents: list[Compression]) -> list[Compression]:
    """The N_OUTLIERS documents with the most and those with the fewest bytes per token, in their
    order: which of them are the outliers depends on the final mean."""
    ratios = [ratio for ratio, _ in documents]
    rising = sorted(range(len(ratios)), key=lambda number: ratios[number])
    falling = sorted(range(len(ratios)), key=lambda number: -ratios[number])
    return [documents[n] for n in sorted({*rising[:N_OUTLIERS], *falling[:N_OUTLIERS]})]


def compression_outliers(
    documents: list[Compression], *, n_tokens: int, n_bytes: int
) -> list[dict[str, Any]]:
    """The records of the N_OUTLIERS documents furthest from the mean, of `n_tokens` ids for
    `n_bytes` bytes, furthest first. With bytes as tokens there are none."""
    mean = math.log(n_bytes / n_tokens) if documents else 0.0
    furthest = sorted(extremes(documents), key=lambda document: -abs(document[0] - mean))
    return [record for ratio, record in furthest[:N_OUTLIERS] if ratio != mean]
