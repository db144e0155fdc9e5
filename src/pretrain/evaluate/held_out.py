"""Held-out text compared with the training text: a sentence where bits/byte would mislead."""

import math
from typing import Any

import numpy as np

from pretrain.corpus.overlap import HashTable
from pretrain.data.format import PreparedData
from pretrain.rng import splitmix64

MAX_TOKENS, CHUNK_TOKENS = 20_000_000, 1 << 20  # of a longer training text the last are read
COPY_BYTES, PIECE_BYTES, N_PIECES = 48, 4, 1 << 16  # longer than a phrase; about a word
# Novels have 0.01 and 0.02 bits, Python code 0.03 and 0.2, ends in another language 0.24 and more.
MAX_COPIED, MAX_DIFFERENCE, MIN_BYTES = 0.1, 0.22, 1000


def compare_splits(data: PreparedData) -> dict[str, Any]:
    """Return `copied`, the share of held-out tokens in sequences of about COPY_BYTES that are in
    the training text too; `difference`, by how many bits (Jensen-Shannon) it is further from the
    training text than a sample of that is; and `notes`, one for each reason to doubt the number."""
    train, val, tokenizer = data.split("train"), data.split("val"), data.tokenizer()
    ids = val.read(0, min(val.n_tokens, CHUNK_TOKENS))
    n_bytes = int(tokenizer.byte_lengths[ids].sum())
    log2 = math.log2(len(ids) / max(n_bytes, 1))
    n, n_piece = (1 << max(0, round(math.log2(b) + log2)) for b in (COPY_BYTES, PIECE_BYTES))
    # Ids that the training text does not have: no sequence across two documents is a copy.
    is_border = np.isin(ids, [tokenizer.start_of_text, tokenizer.end_of_text])
    hashes = _hashes(np.where(is_border, tokenizer.vocab_size + np.arange(len(ids)), ids), n)
    table = HashTable([hashes])
    is_found = np.zeros(len(table.hashes), bool)
    counts = np.zeros((3, N_PIECES))  # of every n-th block of 64, of the others, of held-out text
    first = max(0, train.n_tokens - MAX_TOKENS)
    every = max(2, (train.n_tokens - first) // len(ids))
    for start in range(first, train.n_tokens, CHUNK_TOKENS):
        chunk = train.read(start, min(start + CHUNK_TOKENS + n, train.n_tokens))
        is_found[table.find(_hashes(chunk, n))[1]] = True
        pieces = (_hashes(chunk, n_piece) % N_PIECES).astype(int)
        pieces += N_PIECES * (np.arange(len(pieces)) // 64 % every > 0)
        counts += np.bincount(pieces, minlength=counts.size).reshape(counts.shape)
    starts = np.append(np.isin(hashes, table.hashes[is_found]), False)  # at least one value
    copied = float((np.convolve(starts, np.ones(n)) > 0.5).sum() / max(1, (~is_border).sum()))
    counts[2] = np.bincount((_hashes(ids, n_piece) % N_PIECES).astype(int), minlength=N_PIECES)
    difference = _divergence(counts[2], counts[0] + counts[1]) - _divergence(counts[0], counts[1])
    reasons = {
        f"{'at least ' * (first > 0)}{math.floor(100 * copied)} % of the held-out text stands word "
        "for word in the training text, so bits/byte says how well that is remembered; remove "
        "repeated text, or evaluate on another one": copied > MAX_COPIED,
        "the held-out text is of another kind (language?) than most of the training text, so "
        "bits/byte is that of text like it; give each kind a file": difference > MAX_DIFFERENCE,
        f"only {n_bytes:,} bytes are held out, too few; use more text": n_bytes < MIN_BYTES,
    }
    notes = [reason for reason, is_true in reasons.items() if is_true]
    return {"copied": round(copied, 4), "difference": round(difference, 3), "notes": notes}


def _hashes(ids: Any, n: int) -> Any:
    """Hash each `n` consecutive ids, a power of two: a polynomial whose length is doubled."""
    hashes, width = splitmix64(ids.astype(np.uint64)), 1
    while width < n:
        factor = np.uint64(pow(0x9E3779B97F4A7C15, width, 1 << 64))
        hashes, width = hashes[:-width] * factor + hashes[width:], 2 * width
    return splitmix64(hashes)


def _divergence(*counts: Any) -> float:
    p, q = (each / max(each.sum(), 1) + 1e-30 for each in counts)
    return float((p * np.log2(2 * p / (p + q)) + q * np.log2(2 * q / (p + q))).sum() / 2)
