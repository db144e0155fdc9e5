"""Documents on disk between the steps of a preparation: shards of about SHARD_TEXT_BYTES of text.

A stream of documents is cut wherever a shard is full, so the shards of a corpus are the same
whoever writes them. A document is a line of JSON with its id, title and origin, followed by the
bytes of its text. A file that ends in the middle of a document is a ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from pretrain.corpus.documents import Document
from pretrain.corpus.duplicates import text_hash

SHARD_TEXT_BYTES = 1 << 23
SHARD_DOCUMENTS = 1 << 16

KEY = np.dtype([("hash", "<u8"), ("check", "<u8"), ("n_bytes", "<u8")])
"""One document: the two numbers of `text_hash`, and the bytes of its text."""


def write_document_shards(documents: Iterable[Document], folder: Path) -> list[int]:
    """Write documents as `0.part`, `1.part`, ... with their KEYs in `0.keys.npy`, ...

    Returns the number of documents in each shard: an empty list if there are no documents.
    """
    counts: list[int] = []
    iterator = iter(documents)
    for first in iterator:
        number = len(counts)
        keys: list[tuple[int, int, int]] = []
        n_bytes = 0
        with open(folder / f"{number}.part", "xb") as file:
            for document in chain([first], iterator):
                data = document.text.encode()
                place = (document.source, document.offset, document.source_argument)
                header = [document.id, document.title, *place, len(data)]
                file.write(json.dumps(header, ensure_ascii=False).encode() + b"\n")
                file.write(data)
                keys.append((*text_hash(data), len(data)))
                n_bytes += len(data)
                if n_bytes >= SHARD_TEXT_BYTES or len(keys) >= SHARD_DOCUMENTS:
                    break
        np.save(folder / f"{number}.keys.npy", np.array(keys, KEY))
        counts.append(len(keys))
    return counts


def read_document_shard(path: Path) -> Iterator[Document]:
    """Yield the documents of one file of `write_document_shards`."""
    with open(path, "rb") as file:
        while line := file.readline():
            try:
                id_, title, source, offset, source_argument, n_bytes = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}") from None
            data = file.read(n_bytes)
            if len(data) < n_bytes:
                raise ValueError(f"{path} is truncated")
            yield Document(id_, data.decode(), title, source, offset, source_argument)
