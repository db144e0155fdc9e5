"""The loss of simple models on the same tokens: counts of one, two and three tokens, and a file
compressor.

A language model that is not better than them has learned nothing beyond a table of counts. The
count models are interpolated Kneser-Ney ("Improved backing-off for m-gram language modeling",
Kneser and Ney, 1995; interpolated as in "An empirical study of smoothing techniques for language
modeling", Chen and Goodman, 1999) with one discount per order, estimated from the counts.
"""

from __future__ import annotations

import lzma
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from pretrain.data.batches import Stream
from pretrain.evaluate.loss import Score
from pretrain.tokenizer.tokenizer import Tokenizer

Array = NDArray[np.int64]

# Tables of more training tokens would not fit a small machine's memory; the note reports it.
MAX_COUNTED_TOKENS = 10_000_000
# The window of xz at its default level is 8 MiB, so more training text cannot help it.
XZ_BYTES = 8 << 20


def measure_baselines(train: Stream, val: Stream, *, tokenizer: Tokenizer) -> dict[str, object]:
    """The content of a run's baselines.json: the loss of each baseline on the validation stream."""
    train_ids = train.read(0, min(train.n_tokens, MAX_COUNTED_TOKENS))
    val_ids = val.read(0, val.n_tokens)
    lengths = tokenizer.byte_lengths
    n_targets = len(val_ids) - 2
    n_bytes = int(lengths[val_ids[2:]].sum())

    limit = ""
    if len(train_ids) < train.n_tokens:
        limit = f", from the first {len(train_ids):,} training tokens"
    notes = {
        "unigram": "how often each token occurs",
        "bigram": "given the token before",
        "trigram": "given the two tokens before",
    }
    all_nats = count_model_nats(train_ids, val_ids, vocab_size=tokenizer.vocab_size)
    scores = [Score(nats, n_targets, n_bytes) for nats in all_nats]
    rows: list[dict[str, object]] = [
        {
            "name": name,
            "nats_per_token": score.nats_per_token,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "note": note + limit,
        }
        for (name, note), score in zip(notes.items(), scores, strict=True)
    ]

    token_bytes = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
    token_bytes[tokenizer.end_of_text] = b""
    # Enough ids for XZ_BYTES of text, then cut to the byte.
    mean_length = max(1.0, float(lengths[train_ids].mean()))
    last_ids = train_ids[-math.ceil(1.2 * XZ_BYTES / mean_length) :]
    train_text = b"".join(token_bytes[id_] for id_ in last_ids)[-XZ_BYTES:]
    val_text = b"".join(token_bytes[id_] for id_ in val_ids)
    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        alone, both = pool.map(lambda t: len(lzma.compress(t)), (train_text, train_text + val_text))
    rows.append(
        {
            "name": "xz",
            "nats_per_token": None,
            "perplexity": None,
            "bits_per_byte": 8 * (both - alone) / len(val_text),
            "note": f"the compressor, after {len(train_text):,} bytes of training text",
        }
    )
    return {
        "val_tokens": n_targets,
        "val_bytes": n_bytes,
        "train_tokens": len(train_ids),
        "baselines": rows,
    }


def count_model_nats(train: Array, val: Array, *, vocab_size: int) -> list[float]:
    """Nats of val[2:] under the unigram, bigram and trigram model of `train`.

    The first two ids are context for all three models, so that they have the same targets. An
    n-gram of ids (a, b, c) is the number (a * V + b) * V + c.
    """
    v = vocab_size
    targets = val[2:]
    train_bigrams = train[:-1] * v + train[1:]
    train_trigrams = train_bigrams[:-1] * v + train[2:]
    val_bigrams = val[1:-1] * v + targets
    val_trigrams = (val[:-2] * v + val[1:-1]) * v + targets

    trigrams, trigram_counts = np.unique(train_trigrams, return_counts=True)
    bigrams, bigram_counts = np.unique(train_bigrams, return_counts=True)
    # Below the highest order an n-gram counts once for each distinct id before it (Kneser and Ney).
    lower_bigrams, lower_bigram_counts = np.unique(trigrams % (v * v), return_counts=True)
    lower_unigram_counts = np.bincount(bigrams % v, minlength=v)
    lower_unigrams = np.flatnonzero(lower_unigram_counts)

    counts = np.bincount(train, minlength=v)
    unigram_p = ((counts + 1) / (counts.sum() + v))[targets]
    uniform_p = np.full(len(targets), 1 / v)
    lower_unigram_p = _interpolated(
        lower_unigrams, lower_unigram_counts[lower_unigrams], targets, vocab_size=v, lower=uniform_p
    )
    bigram_p, lower_bigram_p = (
        _interpolated(grams, counts, val_bigrams, vocab_size=v, lower=lower_unigram_p)
        for grams, counts in ((bigrams, bigram_counts), (lower_bigrams, lower_bigram_counts))
    )
    trigram_p = _interpolated(
        trigrams, trigram_counts, val_trigrams, vocab_size=v, lower=lower_bigram_p
    )
    return [float(-np.log(p).sum()) for p in (unigram_p, bigram_p, trigram_p)]


def _interpolated(
    grams: Array, counts: Array, queries: Array, *, vocab_size: int, lower: NDArray[np.float64]
) -> NDArray[np.float64]:
    """p(last id | ids before it) of the n-grams in `queries`, from sorted distinct `grams` with
    their `counts`.

    `lower` is the same probability one order below, which receives the discounted mass.
    """
    n_once = int((counts == 1).sum())
    n_twice = int((counts == 2).sum())
    discount = n_once / (n_once + 2 * n_twice) if n_once and n_twice else 0.5

    contexts, first_places = np.unique(grams // vocab_size, return_index=True)
    context_totals = np.add.reduceat(counts, first_places)
    n_distinct = np.diff(np.append(first_places, len(grams)))

    places = np.searchsorted(grams, queries).clip(max=len(grams) - 1)
    query_counts = np.where(grams[places] == queries, counts[places], 0)
    query_contexts = queries // vocab_size
    context_places = np.searchsorted(contexts, query_contexts).clip(max=len(contexts) - 1)
    is_known = contexts[context_places] == query_contexts

    discounted = np.maximum(query_counts - discount, 0) / context_totals[context_places]
    freed = discount * n_distinct[context_places] / context_totals[context_places]
    return np.where(is_known, discounted + freed * lower, lower)
