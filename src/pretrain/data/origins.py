"""Where each document of a stream came from, in a file beside its ids, and the strangest of all.

It holds a line a document, in the order of the stream; `find_origins` reads it by number or by id,
without holding it in memory. With the inverse of the order that is enough to tell which
documents a step saw and which steps saw a document, without a log of the run.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.corpus.documents import Document

STRANGEST = 10
# Of a shorter document, and of one without tokens, the bytes a token say nothing.
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
        if n_bytes < _MIN_BYTES or n_tokens == 0:
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
        _keep(self._most, ratio, -self._n_seen, entry)
        _keep(self._fewest, -ratio, -self._n_seen, entry)

    def state(self) -> dict[str, Any]:
        """What was seen, as plain values for JSON."""
        names = ("_n_tokens", "_n_bytes", "_n_seen", "_most", "_fewest")
        return {name: getattr(self, name) for name in names}

    def merge(self, state: dict[str, Any]) -> None:
        """Add the `state` of another one, as if its documents had come after these."""
        for kept, entries in ((self._most, state["_most"]), (self._fewest, state["_fewest"])):
            for key, seen, entry in sorted(entries, key=lambda each: -each[1]):
                _keep(kept, key, seen - self._n_seen, entry)
        self._n_tokens += state["_n_tokens"]
        self._n_bytes += state["_n_bytes"]
        self._n_seen += state["_n_seen"]

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


def _keep(kept: list[tuple[float, int, dict[str, Any]]], key: float, seen: int, entry: Any) -> None:
    push = heapq.heappush if len(kept) < STRANGEST else heapq.heappushpop
    push(kept, (key, seen, entry))
