"""The loss of simple models on the same held-out text: counts of tokens and of bytes, compressors.

A language model that is not better than them has learned nothing beyond a table of counts.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np

from pretrain.data.batches import Stream
from pretrain.evaluate.loss import Score
from pretrain.machine import install_command
from pretrain.model.counts import Ids, Probabilities, kneser_ney, longest_counted
from pretrain.tokenizer.tokenizer import Tokenizer

# More training tokens would take long; the note reports it.
MAX_BASELINE_TOKENS = 10_000_000
# Of more text, bytes are counted for longer than tokens, and know less.
MAX_COUNTED_BYTES = 1_000_000
# The window of xz at its default level is 8 MiB, so more training text cannot help it.
XZ_BYTES = 8 << 20
# PPMd has no window, but needs a second for each 4 MB.
PPMD_BYTES = 16 << 20

TOKEN_MODELS = (
    ("unigram", 1, "how often each token occurs"),
    ("bigram", 2, "given the token before"),
    ("trigram", 3, "given the two tokens before"),
    ("four-gram", 4, "given the three tokens before"),
    ("five-gram", 5, "given the four tokens before"),
)
BYTE_ORDER = 6


def measure_baselines(train: Stream, val: Stream, *, tokenizer: Tokenizer) -> dict[str, object]:
    """The content of a run's baselines.json: the loss of each baseline on the validation stream."""
    train_ids = train.read(0, min(train.n_tokens, MAX_BASELINE_TOKENS))
    val_ids = val.read(0, val.n_tokens)
    lengths = tokenizer.byte_lengths
    # The targets are those of a model: every id but the first.
    n_targets, n_bytes = len(val_ids) - 1, int(lengths[val_ids[1:]].sum())
    token_bytes = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]

    def row(name: str, probabilities: Probabilities, note: str) -> dict[str, object]:
        score = Score(-float(np.log(probabilities).sum()), n_targets, n_bytes)
        return {
            "name": name,
            "nats_per_token": score.nats_per_token,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "note": note,
        }

    limit = ""
    if len(train_ids) < train.n_tokens:
        limit = f", from the first {len(train_ids):,} training tokens"
    v = tokenizer.vocab_size
    longest = min(5, longest_counted(v))
    by_order = kneser_ney(train_ids, val_ids, vocab_size=v, order=longest)
    rows = [
        row(name, by_order[order - 1][1:], note + limit)
        for name, order, note in TOKEN_MODELS
        if order in (1, 2, 3, longest) and order <= longest
    ]
    if int(lengths[train_ids].sum()) <= MAX_COUNTED_BYTES:
        train_bytes, val_bytes = (_ids_of_bytes(ids, token_bytes) for ids in (train_ids, val_ids))
        *_, highest = kneser_ney(train_bytes, val_bytes, vocab_size=257, order=BYTE_ORDER)
        first = len(_ids_of_bytes(val_ids[:1], token_bytes))
        note = "given the five bytes before"
        rows.append(row("byte six-gram", highest[first:], note))
    rows += _compressor_rows(train_ids, val_ids, token_bytes)
    return {
        "val_tokens": n_targets,
        "val_bytes": n_bytes,
        "train_tokens": len(train_ids),
        "baselines": rows,
    }


def _ids_of_bytes(ids: Ids, token_bytes: Sequence[bytes]) -> Ids:
    """The text of the ids as numbers of bytes, 256 for a special token, which has none."""
    pieces = [np.frombuffer(each, np.uint8) if each else np.array([256]) for each in token_bytes]
    return np.concatenate([pieces[id_] for id_ in ids.tolist()]).astype(np.int64)


def _compressor_rows(
    train_ids: Ids, val_ids: Ids, token_bytes: Sequence[bytes]
) -> list[dict[str, object]]:
    """What the held-out text adds to the compressed training text."""
    compressors: dict[str, tuple[int, Callable[[bytes], bytes]]]
    compressors = {"PPMd": (PPMD_BYTES, _ppmd), "xz": (XZ_BYTES, lzma.compress)}
    missing = ""
    if find_spec("pyppmd") is None:
        del compressors["PPMd"]
        missing = f"; for PPMd: {install_command('pyppmd', extra='ppmd')}"

    # Enough ids for the longest text, then cut to the byte.
    n_bytes = np.cumsum(np.array([len(each) for each in token_bytes])[train_ids[::-1]])
    n_ids = 1 + int(np.searchsorted(n_bytes, PPMD_BYTES))
    train_text = b"".join(token_bytes[id_] for id_ in train_ids[-n_ids:])
    val_text = b"".join(token_bytes[id_] for id_ in val_ids)
    rows: list[dict[str, object]] = []
    with ThreadPoolExecutor(2) as pool:  # both compressors release the GIL
        for name, (limit, compress) in compressors.items():
            before = train_text[-limit:]
            alone, both = map(len, pool.map(compress, (before, before + val_text)))
            note = f"the compressor, after {len(before):,} bytes of training text; it learns from "
            rows.append(
                {
                    "name": name,
                    "nats_per_token": None,
                    "perplexity": None,
                    "bits_per_byte": 8 * (both - alone) / (len(val_text) or math.nan),
                    "note": f"{note}the held-out text as it reads it{missing}",
                }
            )
    return rows


def _ppmd(text: bytes) -> bytes:
    """PPMd of order 6. Random bytes need the most memory, and in this much nothing is forgotten."""
    import pyppmd

    compressed: bytes = pyppmd.compress(text, max_order=6, mem_size=(1 << 20) + 16 * len(text))
    return compressed
