"""Documents on disk between the steps of a preparation: files of about SHARD_TEXT_BYTES of text.

A stream of documents is cut into such parts wherever it is long enough, so the parts of a corpus
are the same whoever makes them. A document is a line of JSON about it, then the bytes of its text.
A file that ends in the middle of a document is a ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pretrain.corpus.documents import Document
from pretrain.corpus.duplicates import text_hash

SHARD_TEXT_BYTES = 1 << 23
SHARD_DOCUMENTS = 1 << 16

KEY = np.dtype([("hash", "<u8"), ("check", "<u8"), ("n_bytes", "<u8")])
"""Of a document: `text_hash` of its text in two halves, and the bytes of that."""


def write_document_shards(documents: Iterable[Document], folder: Path) -> list[int]:
    """Write documents as `0.part`, `1.part`, ... with their KEYs in `0.keys.npy`, ...; returns how
    many documents each holds. Nothing is written where there are none."""
    counts: list[int] = []
    rest = iter(documents)
    while (first := next(rest, None)) is not None:
        keys: list[tuple[int, int, int]] = []
        with open(folder / f"{len(counts)}.part", "xb") as file:
            n_bytes = 0
            document: Document | None = first
            while document is not None:
                data = document.text.encode()
                about = [
                    document.id,
                    document.title,
                    document.source,
                    document.offset,
                    document.source_argument,
                    len(data),
                ]
                file.write(json.dumps(about, ensure_ascii=False).encode() + b"\n")
                file.write(data)
                keys.append((*text_hash(data), len(data)))
                n_bytes += len(data)
                is_full = n_bytes >= SHARD_TEXT_BYTES or len(keys) >= SHARD_DOCUMENTS
                document = None if is_full else next(rest, None)
        np.save(folder / f"{len(counts)}.keys.npy", np.array(keys, KEY))
        counts.append(len(keys))
    return counts


def read_document_shard(path: Path) -> Iterator[Document]:
    """The documents of one file of `write_document_shards`."""
    with open(path, "rb") as file:
        while line := file.readline():
            try:
                id_, title, source, offset, source_argument, n_bytes = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}") from None
            data = file.read(n_bytes)
            if len(data) < n_bytes:
                raise ValueError(f"{path} is cut off")
            yield Document(id_, data.decode(), title, source, offset, source_argument)
