"""Exact and near-duplicate documents: which ones to remove, in memory independent of the corpus.

Hashes of documents come in as files of records, one file for each part of the corpus; for each
document the first one of its group of duplicates goes out. Records are split into ranges of hashes,
so that each range is sorted in memory by itself (an external distribution sort) and ranges can be
processed in parallel.

Near-duplicates are those of MinHash with banding (Broder, "On the resemblance and containment of
documents", 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3), with the
setting of FineWeb (Penedo et al., 2024): 5-grams of words, 14 bands of 8 hashes. Two documents that
share 75 % of their 5-grams are detected with probability 77 %, at 85 % with more than 98 %, at 50 %
with 5 %.
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
"""A document and an earlier duplicate of it, as numbers in the order of the corpus."""
Records = NDArray[np.void]


def text_hash(text: bytes) -> tuple[int, int]:
    """Hash a text to two 64-bit numbers that identify it: BLAKE2b, and length with CRC-32."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big"), len(text) << 32 | zlib.crc32(text)


def band_hashes(text: str) -> Hashes:
    """Hash each MinHash band, shape (N_BANDS,): documents that share one are near-duplicates.

    Of fewer than SHINGLE_WORDS words there is one shingle; without a word the result is empty.
    """
    words = word_hashes(text)
    shingles = ngram_hashes(words, min(SHINGLE_WORDS, len(words)) or 1)
    if not shingles.size:
        return shingles
    high_bits = (shingles >> np.uint64(32)).astype(np.uint32)
    # The minimum of each of N_BANDS x BAND_HASHES permutations, a x + b modulo 2^32.
    factors, addends = _permutations()
    minimum = np.full(len(factors), 0xFFFFFFFF, np.uint32)
    for start in range(0, len(high_bits), 4096):
        values = np.multiply.outer(factors, high_bits[start : start + 4096])
        values += addends[:, None]
        np.minimum(minimum, values.min(axis=1), out=minimum)
    bands = minimum.reshape(N_BANDS, BAND_HASHES)
    digests = b"".join(
        hashlib.blake2b(band.tobytes(), digest_size=8, salt=bytes([number])).digest()
        for number, band in enumerate(bands)
    )
    return np.frombuffer(digests, dtype="<u8")


@cache
def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    n = N_BANDS * BAND_HASHES
    random_bytes = hashlib.shake_256(b"pretrain minhash").digest(8 * n)
    numbers = np.frombuffer(random_bytes, dtype="<u4")
    return numbers[:n] | np.uint32(1), numbers[n:]


def write_records(path: Path, records: Records) -> None:
    """Write records sorted by hash, so that a range of hashes is contiguous in the file."""
    np.save(path, records[np.argsort(records["hash"], kind="stable")])


def duplicate_pairs(
    files: Iterable[tuple[Path, int]], *, index: int, n_ranges: int
) -> Iterator[NDArray[np.void]]:
    """Yield DUPLICATE_PAIRs of documents that share a hash of range number `index`.

    `files` are those of `write_records` in the order of the corpus, each with the number of its
    first document, which is added to the numbers in it.
    """
    low = index * 2**64 // n_ranges
    high = (index + 1) * 2**64 // n_ranges - 1
    buffer: list[Records] = []
    n_buffered = 0
    for path, first_document in files:
        records = np.load(path, mmap_mode="r")
        start = np.searchsorted(records["hash"], np.uint64(low), side="left")
        stop = np.searchsorted(records["hash"], np.uint64(high), side="right")
        in_range = np.array(records[start:stop])
        in_range["document"] += np.uint64(first_document)
        buffer.append(in_range)
        n_buffered += len(in_range)
        # Only the first record of each group is kept, so that many duplicates need little memory.
        if n_buffered > 2 * RECORDS_AT_ONCE:
            firsts, pairs = _split_groups(np.concatenate(buffer))
            buffer, n_buffered = [firsts], len(firsts)
            yield pairs
    if buffer:
        yield _split_groups(np.concatenate(buffer))[1]


def _split_groups(records: Records) -> tuple[Records, NDArray[np.void]]:
    """Return the first record of each group with one hash, and the others paired with it."""
    order = np.lexsort((records["document"], records["check"], records["hash"]))
    records = records[order]
    is_first = np.ones(len(records), bool)
    keys = records[["hash", "check"]]
    is_first[1:] = keys[1:] != keys[:-1]
    firsts = records[is_first]
    pairs = np.empty(len(records) - len(firsts), DUPLICATE_PAIR)
    pairs["document"] = records["document"][~is_first]
    pairs["first"] = firsts["document"][np.cumsum(is_first) - 1][~is_first]
    return firsts, pairs


def component_roots(
    pairs: Iterable[NDArray[np.void]], *, n_documents: int, scratch: Path
) -> NDArray[np.uint64]:
    """For each document the first document of its connected component, shape (n_documents,).

    A document without an earlier duplicate is its own root. Example: the pairs (2, 0) and (3, 2)
    of 4 documents give [0, 1, 0, 0]. The result is mapped to the file `scratch`, so that the
    operating system can move it out of memory.
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
            is_apart = left != right
            left, right = left[is_apart], right[is_apart]
            # Attach the higher root to the lower one. If a root is attached several times, the
            # lowest wins, and the other pairs are processed again.
            high, low = np.maximum(left, right), np.minimum(left, right)
            np.minimum.at(roots, high, low)
    for start in range(0, n_documents, RECORDS_AT_ONCE):
        stop = start + RECORDS_AT_ONCE
        roots[start:stop] = _roots_of(roots, np.array(roots[start:stop]))
    return roots


def _roots_of(roots: NDArray[np.uint64], documents: NDArray[np.uint64]) -> NDArray[np.uint64]:
    parents: NDArray[np.uint64] = roots[documents]
    while not np.array_equal(parents, documents):
        documents = parents
        parents = roots[parents]
    return documents
