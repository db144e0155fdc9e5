"""Equal and nearly equal documents: which ones to remove, in memory that does not grow with the
corpus.

Hashes of documents come in as files of records, one file a part of the corpus; a file of removed
documents goes out. Records are dealt into ranges of hashes, so that each range is sorted in memory
by itself (an external distribution sort) and ranges can be worked on by anyone. The first document
in the order of the corpus is kept.

Nearly equal is MinHash with banding (Broder, "On the resemblance and containment of documents",
1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3), at the setting of
FineWeb (Penedo et al., 2024): 5 words in a row, 14 bands of 8 hashes, so that of two documents
which share 75 % of these, 77 % are found, at 85 % more than 98 %, at 50 % one in twenty.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.words import Hashes, ngram_hashes, word_hashes

SHINGLE_WORDS = 5
N_BANDS = 14
BAND_HASHES = 8
RECORDS_AT_ONCE = 1 << 20
"""Records sorted in memory at once, 24 bytes each."""

HASH_RECORD = np.dtype([("hash", "<u8"), ("check", "<u8"), ("document", "<u8")])
"""A hash of a document; `check` is 64 more bits of it, 0 for a band."""
DUPLICATE_PAIR = np.dtype([("document", "<u8"), ("first", "<u8")])
"""A document and an earlier one that is like it, as numbers in the order of the corpus."""
Records = NDArray[np.void]


def text_hash(text: bytes) -> tuple[int, int]:
    """Two numbers by which equal texts are told: 64 bits of BLAKE2b, and length with CRC-32."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big"), len(text) << 32 | zlib.crc32(text)


def band_hashes(text: str) -> Hashes:
    """One hash a band, shape (N_BANDS,): documents that share one are nearly equal. Fewer than
    SHINGLE_WORDS words count as they are; without a word there is none."""
    words = word_hashes(text)
    shingles = ngram_hashes(words, min(SHINGLE_WORDS, len(words)) or 1)
    if not shingles.size:
        return shingles
    return _bands(_signature((shingles >> np.uint64(32)).astype(np.uint32)))


def _signature(shingles: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The least value of each of N_BANDS x BAND_HASHES permutations, a x + b modulo 2^32."""
    factors, addends = _permutations()
    least = np.full(len(factors), 0xFFFFFFFF, np.uint32)
    for start in range(0, len(shingles), 4096):
        values = np.multiply.outer(factors, shingles[start : start + 4096])
        values += addends[:, None]
        np.minimum(least, values.min(axis=1), out=least)
    return least


def _bands(signature: NDArray[np.uint32]) -> Hashes:
    rows = signature.reshape(N_BANDS, BAND_HASHES)
    digests = b"".join(
        hashlib.blake2b(row.tobytes(), digest_size=8, salt=bytes([band])).digest()
        for band, row in enumerate(rows)
    )
    return np.frombuffer(digests, dtype="<u8")


@cache
def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    n = N_BANDS * BAND_HASHES
    draw = hashlib.shake_256(b"pretrain minhash").digest(8 * n)
    numbers = np.frombuffer(draw, dtype="<u4")
    return numbers[:n] | np.uint32(1), numbers[n:]


def n_hash_ranges(n_records: int) -> int:
    """Into how many ranges of hashes so many records are dealt."""
    return max(1, -(-n_records // RECORDS_AT_ONCE))


def write_records(path: Path, records: Records) -> None:
    """A file of records in the order of their hashes, so that a range of them lies together."""
    np.save(path, records[np.argsort(records["hash"], kind="stable")])


def duplicate_pairs(
    files: Iterable[tuple[Path, int]], *, index: int, n_ranges: int
) -> Iterator[NDArray[np.void]]:
    """DUPLICATE_PAIRs of documents that share a hash, from one of `n_ranges` ranges of hashes.

    `files` are those of `write_records` in the order of the corpus, each with the number of its
    first document, to which its own numbers are added.
    """
    low, high = index * 2**64 // n_ranges, (index + 1) * 2**64 // n_ranges - 1
    waiting: list[Records] = []
    n_waiting = 0
    for path, first_document in files:
        records = np.load(path, mmap_mode="r")
        start = np.searchsorted(records["hash"], np.uint64(low), side="left")
        stop = np.searchsorted(records["hash"], np.uint64(high), side="right")
        found = np.array(records[start:stop])
        found["document"] += np.uint64(first_document)
        waiting.append(found)
        n_waiting += len(found)
        # However many are alike, only the first of them waits on.
        if n_waiting > 2 * RECORDS_AT_ONCE:
            kept, pairs = _grouped(np.concatenate(waiting))
            waiting, n_waiting = [kept], len(kept)
            yield pairs
    if waiting:
        yield _grouped(np.concatenate(waiting))[1]


def _grouped(records: Records) -> tuple[Records, NDArray[np.void]]:
    """The first record of each group that shares a hash, and the others as pairs."""
    order = np.lexsort((records["document"], records["check"], records["hash"]))
    records = records[order]
    is_first = np.ones(len(records), bool)
    is_first[1:] = (records["hash"][1:] != records["hash"][:-1]) | (
        records["check"][1:] != records["check"][:-1]
    )
    kept = records[is_first]
    pairs = np.empty(len(records) - len(kept), DUPLICATE_PAIR)
    pairs["document"] = records["document"][~is_first]
    pairs["first"] = kept["document"][np.cumsum(is_first) - 1][~is_first]
    return kept, pairs


def component_roots(
    pairs: Iterable[NDArray[np.void]], *, n_documents: int, scratch: Path
) -> NDArray[np.uint64]:
    """For each document the first one that it is connected with by pairs, shape (n_documents,):
    its own number where that is itself.

    A map of the file `scratch`, so that the system and not this process holds it.
    """
    roots: NDArray[np.uint64] = np.lib.format.open_memmap(
        scratch, mode="w+", dtype=np.uint64, shape=(n_documents,)
    )
    for start in range(0, n_documents, RECORDS_AT_ONCE):
        stop = min(start + RECORDS_AT_ONCE, n_documents)
        roots[start:stop] = np.arange(start, stop, dtype=np.uint64)
    for chunk in pairs:
        left, right = chunk["document"], chunk["first"]
        while left.size:
            left, right = _roots_of(roots, left), _roots_of(roots, right)
            apart = left != right
            left, right = left[apart], right[apart]
            # The higher root goes below the lower; where several want it the lowest wins, and the
            # others come again.
            high, low = np.maximum(left, right), np.minimum(left, right)
            np.minimum.at(roots, high, low)
    for start in range(0, n_documents, RECORDS_AT_ONCE):
        part = roots[start : start + RECORDS_AT_ONCE]
        roots[start : start + RECORDS_AT_ONCE] = _roots_of(roots, np.array(part))
    return roots


def _roots_of(roots: NDArray[np.uint64], documents: NDArray[np.uint64]) -> NDArray[np.uint64]:
    above: NDArray[np.uint64] = roots[documents]
    while not np.array_equal(above, documents):
        documents, above = above, roots[above]
    return documents
