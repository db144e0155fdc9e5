"""Where each document of a stream came from, in a file beside its ids, and the strangest of all.

A line a document goes out, in the order of the stream; `find_origins` reads it back by number or by
id, without holding it in memory. With the inverse of the order that is enough to tell which
documents a step saw and which steps saw a document, without a log of the run.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.corpus.documents import Document
from pretrain.data.durable import sync_and_close

STRANGEST = 10
# Of a shorter document the bytes a token say nothing.
_MIN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one document came from."""

    id: str
    file: str
    """Path of the file, relative to the source that was read."""
    offset: int
    """Where the document starts in its (decompressed) file, in bytes."""
    title: str


class OriginsWriter:
    """Writes a line for each document of one stream; `close` gives the hash of the file."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115 closed by `close`
        self._sha256 = hashlib.sha256()

    def add(self, document: Document) -> None:
        origin = Origin(document.id, document.source, document.offset, document.title)
        line = json.dumps(asdict(origin), ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._sha256.update(line)

    def close(self) -> str:
        sync_and_close(self._file)
        return self._sha256.hexdigest()

    def abandon(self) -> None:
        """Close the file without finishing it."""
        self._file.close()


def find_origins(path: Path, wanted: Callable[[int, Origin], bool]) -> Iterator[tuple[int, Origin]]:
    """Number and origin of each document that is `wanted`, in the order of the stream."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            try:
                origin = Origin(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: line {number + 1} is damaged: {error}") from None
            if wanted(number, origin):
                yield number, origin


class Strangest:
    """The documents whose bytes a token lie furthest from the usual, in constant memory.

    Many tokens for few bytes are what the tokenizer never saw: another language, noise, base64. Few
    tokens for many bytes are what repeats itself.
    """

    def __init__(self) -> None:
        self._n_tokens = self._n_bytes = self._n_seen = 0
        # The most and the fewest bytes a token so far; which of them are strangest hangs on all.
        self._most: list[tuple[float, int, dict[str, Any]]] = []
        self._fewest: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, document: Document, *, n_tokens: int, n_bytes: int) -> None:
        """Look at one document, of which `n_tokens` ids stand for `n_bytes` bytes."""
        self._n_seen += 1
        self._n_tokens += n_tokens
        self._n_bytes += n_bytes
        if n_bytes < _MIN_BYTES:
            return
        ratio = math.log(n_bytes / n_tokens)
        is_full = len(self._most) == STRANGEST
        if is_full and ratio <= self._most[0][0] and -ratio <= self._fewest[0][0]:
            return
        entry = {
            "id": document.id,
            "file": document.source,
            "offset": document.offset,
            "n_bytes": n_bytes,
            "bytes_per_token": round(n_bytes / n_tokens, 3),
            "begins": document.text[:80],
        }
        for kept, key in ((self._most, ratio), (self._fewest, -ratio)):
            push = heapq.heappush if len(kept) < STRANGEST else heapq.heappushpop
            push(kept, (key, -self._n_seen, entry))

    def found(self) -> list[dict[str, Any]]:
        """The strangest first."""
        if not self._most:
            return []
        usual = math.log(self._n_bytes / self._n_tokens)
        # A document may be among both kinds where there are few.
        candidates = {
            -seen: (abs(sign * key - usual), entry)
            for kept, sign in ((self._most, 1), (self._fewest, -1))
            for key, seen, entry in kept
        }
        ordered = sorted(candidates.items(), key=lambda item: (-item[1][0], item[0]))
        # With bytes as tokens nothing is strange.
        return [entry for _, (distance, entry) in ordered[:STRANGEST] if distance > 0]
