"""Which text is for training and which is for validation: a pure function of the text and the
fraction.

The hashes and sizes of all documents come in, a `Split` goes out that tells for each document which
parts go where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.duplicates import text_hash
from pretrain.data.manifest import SplitName

VAL_BYTES = 400_000
"""Validation text aimed at by default: enough that the loss's standard error is well below 1 %."""
MOST_VAL_BYTES = 2_000_000
"""Of more text a five hundredth, up to this: it is scored at the end of a run, however short."""
MIN_DOCUMENTS = 20
"""With fewer different documents, whole ones are too coarse a measure: each document's end is
validation instead."""
MIN_TAIL_BYTES = 32
"""A shorter end would hardly be scored; such a document stays in training whole."""
_CUT_SEARCH_CHARACTERS = 1000


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
            yield ("val" if text_hash(text.encode())[0] < self.bound else "train"), text
            return
        cut = _cut(text, self.val_fraction)
        if cut:
            yield "train", text[:cut]
            yield "val", text[cut:]
        else:
            yield "train", text


def default_val_fraction(n_bytes: int) -> float:
    """The fraction that makes VAL_BYTES to MOST_VAL_BYTES of validation text, at most 0.1."""
    wanted = min(max(VAL_BYTES, 0.002 * n_bytes), MOST_VAL_BYTES)
    return min(wanted / max(n_bytes, 1), 0.1)


def choose_split(
    keys: Callable[[], Iterable[NDArray[np.void]]], *, val_fraction: float | None
) -> Split:
    """Divide by whole documents where there are at least MIN_DOCUMENTS different ones, else by the
    end of each.

    A document is validation if the 64-bit BLAKE2b of its text, as a fraction of 2^64, is below
    `val_fraction`, or if it has the smallest hash; so equal documents are never on both sides, and,
    where `val_fraction` is given, a document added later moves no other one. Where that would give
    validation most of the text (one document is nearly everything), the ends are taken too. `keys`
    gives the documents' `corpus.parts.KEY`s, in arrays, each time it is called.
    """
    n_bytes = 0
    smallest: set[int] = set()
    for chunk in keys():
        n_bytes += int(chunk["n_bytes"].sum())
        smallest.update(np.unique(chunk["hash"])[:MIN_DOCUMENTS].tolist())
        smallest = set(sorted(smallest)[:MIN_DOCUMENTS])
    fraction = val_fraction if val_fraction is not None else default_val_fraction(n_bytes)
    if len(smallest) == MIN_DOCUMENTS:
        bound = max(int(fraction * 2**64), min(smallest) + 1)
        n_val_bytes = sum(
            int(chunk["n_bytes"][chunk["hash"] < np.uint64(bound)].sum()) for chunk in keys()
        )
        if n_val_bytes <= max(0.5, 1.5 * fraction) * n_bytes:
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
