"""Which text is for training and which is for validation: a pure function of the text and the
fraction.

A `Census` of all documents comes in, a `Split` goes out that tells for each document which parts go
where. Refused is a corpus too small to have both.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.data.manifest import SplitName

VAL_BYTES = 400_000
"""Validation text aimed at by default: enough that the loss's standard error is well below 1 %."""
MIN_DOCUMENTS = 20
"""With fewer different documents, whole ones are too coarse a measure: each document's end is
validation instead."""
MIN_TAIL_BYTES = 32
"""A shorter end would hardly be scored; such a document stays in training whole."""
_CUT_SEARCH_CHARACTERS = 1000


class Census:
    """Counts documents: 16 bytes of memory each, whatever their length."""

    def __init__(self) -> None:
        self._keys = array("Q")
        self._sizes = array("Q")
        self._order = hashlib.sha256()
        self.n_bytes = 0

    def add(self, text: str) -> None:
        """Count one document."""
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        self._keys.append(int.from_bytes(digest, "big"))
        self._sizes.append(len(data))
        self._order.update(digest)
        self.n_bytes += len(data)

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return len(self._keys)

    @property
    def sha256(self) -> str:
        """Hash of the documents' texts in their order."""
        return self._order.hexdigest()

    def keys_and_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """The hash and the bytes of each document, two arrays of shape (n_documents,), uint64."""
        return np.array(self._keys, dtype=np.uint64), np.array(self._sizes, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Split:
    """How documents are divided."""

    val_fraction: float
    policy: str
    """"documents" or "tails"."""
    bound: int
    """Under "documents": documents whose hash is below this are validation."""

    def parts(self, text: str) -> Iterator[tuple[SplitName, str]]:
        """The parts of one document, in order, whose texts joined are the document's."""
        if self.policy == "documents":
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            yield ("val" if int.from_bytes(digest, "big") < self.bound else "train"), text
            return
        cut = _cut(text, self.val_fraction)
        if cut:
            yield "train", text[:cut]
            yield "val", text[cut:]
        else:
            yield "train", text


def default_val_fraction(n_bytes: int) -> float:
    """The fraction that makes about VAL_BYTES of validation text, from 0.002 to 0.1."""
    return min(max(VAL_BYTES / max(n_bytes, 1), 0.002), 0.1)


def choose_split(census: Census, *, val_fraction: float | None) -> Split:
    """Divide by whole documents where there are at least MIN_DOCUMENTS different ones, else by the
    end of each.

    A document is validation if the 64-bit BLAKE2b of its text, as a fraction of 2^64, is below
    `val_fraction`, or if it has the smallest hash; so equal documents are never on both sides, and
    a document added later moves no other one. Where that would give validation most of the text
    (one document is nearly everything), the ends are taken too.
    """
    fraction = val_fraction if val_fraction is not None else default_val_fraction(census.n_bytes)
    keys, sizes = census.keys_and_sizes()
    if len(np.unique(keys)) >= MIN_DOCUMENTS:
        bound = max(int(fraction * 2**64), int(keys.min()) + 1)
        n_val_bytes = int(sizes[keys < np.uint64(bound)].sum())
        most = max(0.5, 1.5 * fraction) * census.n_bytes
        if n_val_bytes <= most:
            return Split(val_fraction=fraction, policy="documents", bound=bound)
    return Split(val_fraction=fraction, policy="tails", bound=0)


def _cut(text: str, val_fraction: float) -> int:
    """Where the validation tail begins, at a whitespace if one is near; 0 if the document stays
    whole."""
    wanted = round(len(text) * (1 - val_fraction))
    cut = wanted
    for distance in range(min(_CUT_SEARCH_CHARACTERS, wanted)):
        # The whitespace goes to the tail, so that the head ends like a text and the tail's tokens
        # are usual ones.
        if text[wanted - distance].isspace() if wanted - distance < len(text) else False:
            cut = wanted - distance
            break
    if cut <= 0 or len(text[cut:].encode()) < MIN_TAIL_BYTES or not text[:cut].strip():
        return 0
    return cut
