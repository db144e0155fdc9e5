"""What simple models reach on the same tokens: counts of one, two and three tokens, and a file
compressor.

A language model that does not beat them has learned nothing that a table does not hold. The count
models are interpolated Kneser-Ney ("Improved backing-off for m-gram language modeling", Kneser and
Ney, 1995; interpolated as in Chen and Goodman, 1999) with one discount an order, estimated from the
counts.
"""

from __future__ import annotations

import lzma
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.data import TokenStream
from pretrain.evaluate.loss import Score
from pretrain.tokenizer import Tokenizer

Array = NDArray[np.int64]

# Tables of more tokens than this would not fit a small machine's memory; the note says when it was
# cut.
COUNTED_TOKENS = 10_000_000
# xz at its default strength looks back 8 MiB, so more text before the validation text cannot help
# it.
XZ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Baseline:
    name: str
    nats_per_token: float | None
    perplexity: float | None
    bits_per_byte: float
    note: str


def _interpolate(
    grams: Array, counts: Array, wanted: Array, *, vocab_size: int, lower: NDArray[np.float64]
) -> NDArray[np.float64]:
    """p(word | context) for each wanted gram, from sorted unique `grams` (context * V + word) with
    `counts`.

    `lower` is the probability of the same words one order below, where the discounted mass goes.
    """
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    discount = ones / (ones + 2 * twos) if ones and twos else 0.5
    contexts, first = np.unique(grams // vocab_size, return_index=True)
    total = np.add.reduceat(counts, first)
    kinds = np.diff(np.append(first, len(grams)))
    place = np.searchsorted(grams, wanted).clip(max=len(grams) - 1)
    count = np.where(grams[place] == wanted, counts[place], 0)
    context = wanted // vocab_size
    home = np.searchsorted(contexts, context).clip(max=len(contexts) - 1)
    known = contexts[home] == context
    kept = np.maximum(count - discount, 0) / total[home]
    spread = discount * kinds[home] / total[home]
    return np.where(known, kept + spread * lower, lower)


def count_model_nats(train: Array, val: Array, *, vocab_size: int) -> list[float]:
    """Nats of val[2:] under the unigram, bigram and trigram model of `train`.

    The first two ids are context for all three, so that they are compared on the same targets.
    """
    v = vocab_size
    words = val[2:]
    bigrams_seen, bigrams = train[:-1] * v + train[1:], val[1:-1] * v + words
    trigrams_seen = bigrams_seen[:-1] * v + train[2:]
    trigrams = (val[:-2] * v + val[1:-1]) * v + words
    tri, tri_counts = np.unique(trigrams_seen, return_counts=True)
    bi, bi_counts = np.unique(bigrams_seen, return_counts=True)
    # Below the highest order a gram counts once for each different id before it (Kneser and Ney).
    bi_kinds, bi_kind_counts = np.unique(tri % (v * v), return_counts=True)
    uni_kinds = np.bincount(bi % v, minlength=v)
    flat = np.full(len(words), 1 / v)
    seen = np.bincount(train, minlength=v)
    unigram = ((seen + 1) / (seen.sum() + v))[words]
    all_words = np.flatnonzero(uni_kinds)
    start = _interpolate(all_words, uni_kinds[all_words], words, vocab_size=v, lower=flat)
    bigram = _interpolate(bi, bi_counts, bigrams, vocab_size=v, lower=start)
    middle = _interpolate(bi_kinds, bi_kind_counts, bigrams, vocab_size=v, lower=start)
    trigram = _interpolate(tri, tri_counts, trigrams, vocab_size=v, lower=middle)
    return [float(-np.log(p).sum()) for p in (unigram, bigram, trigram)]


def _xz_bits_per_byte(train: bytes, val: bytes) -> float:
    """Bits that xz needs for `val` once it has read `train`, per byte of `val`."""
    with ThreadPoolExecutor(2) as pool:  # lzma lets go of the interpreter's lock
        sizes = list(pool.map(lambda text: len(lzma.compress(text)), (train, train + val)))
    return 8 * (sizes[1] - sizes[0]) / len(val)


def measure_baselines(
    train: TokenStream, val: TokenStream, *, tokenizer: Tokenizer
) -> dict[str, object]:
    """Bits per byte of the baselines on the validation stream, as written to a run's
    baselines.json."""
    seen = train.read(0, min(train.n_tokens, COUNTED_TOKENS))
    ids = val.read(0, val.n_tokens)
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    pieces[tokenizer.end_of_text] = b""
    lengths = tokenizer.byte_lengths()
    cut = "" if len(seen) == train.n_tokens else f", from the first {len(seen):,} training tokens"
    notes = (
        "how often each token occurs" + cut,
        "given the token before" + cut,
        "given the two tokens before" + cut,
    )
    rows = []
    n_bytes = int(lengths[ids[2:]].sum())
    all_nats = count_model_nats(seen, ids, vocab_size=tokenizer.vocab_size)
    for name, nats, note in zip(("unigram", "bigram", "trigram"), all_nats, notes, strict=True):
        result = Score(nats, len(ids) - 2, n_bytes)
        rows.append(
            Baseline(name, result.nats_per_token, result.perplexity, result.bits_per_byte, note)
        )
    # Roughly enough ids for XZ_BYTES of text, then cut to the byte.
    mean = max(1.0, float(lengths[seen].mean()))
    tail = seen[-math.ceil(1.2 * XZ_BYTES / mean) :]
    before = b"".join(pieces[i] for i in tail)[-XZ_BYTES:]
    val_text = b"".join(pieces[i] for i in ids)
    note = f"the compressor, after {len(before):,} bytes of training text"
    rows.append(Baseline("xz", None, None, _xz_bits_per_byte(before, val_text), note))
    return {
        "val_tokens": len(ids) - 2,
        "val_bytes": n_bytes,
        "train_tokens": len(seen),
        "baselines": [asdict(row) for row in rows],
    }
