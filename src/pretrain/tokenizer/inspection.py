"""Statistics of a vocabulary, and of how texts use it.

Texts of named sources come in, a report of plain values for JSON goes out: bytes per token by
source, tokens that the texts never or rarely use (a model cannot learn those), the longest tokens,
and strange ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pretrain.tokenizer.tokenizer import Tokenizer

RARE = 100
"""A token with fewer occurrences is under-trained: its embedding stays close to its initial value
(Land and Bartolo, "Fishing for Magikarp", 2024, find such tokens in most models)."""
SHOWN = 20


def inspect(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Report statistics of a tokenizer and of texts, given as (source, text)."""
    values = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]

    def rows(ids: Iterable[int]) -> list[dict[str, Any]]:
        return [
            {"id": id_, "bytes": len(values[id_]), "text": values[id_].decode("utf-8", "replace")}
            for id_ in list(ids)[:SHOWN]
        ]

    longest = sorted(range(tokenizer.vocab_size), key=lambda id_: -len(values[id_]))
    strange = [id_ for id_ in longest if len(values[id_]) > 1 and _is_strange(values[id_])]
    report: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "sha256": tokenizer.sha256,
        "longest": rows(longest),
        "n_strange": len(strange),
        "strangest": rows(strange),
    }

    counts = np.zeros(tokenizer.vocab_size, np.int64)
    sources: dict[str, dict[str, float]] = {}
    for source, text in texts:
        ids = tokenizer.encode(text)
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        row = sources.setdefault(source, {"bytes": 0, "tokens": 0, "bytes_per_token": 0.0})
        row["bytes"] += len(text.encode())
        row["tokens"] += len(ids)
        row["bytes_per_token"] = row["bytes"] / max(1, row["tokens"])
    if not sources:
        return report

    has_text = tokenizer.byte_lengths() > 0
    unused = np.flatnonzero(has_text & (counts == 0))
    rare = np.flatnonzero(has_text & (counts > 0) & (counts < RARE))
    return report | {
        "sources": sources,
        "n_unused": len(unused),
        "unused": rows(sorted(unused.tolist(), key=lambda id_: -len(values[id_]))),
        "n_rare": len(rare),
        "rare": rows(rare[np.argsort(counts[rare])].tolist()),
    }


def _is_strange(value: bytes) -> bool:
    """Whether bytes are not valid UTF-8 by themselves, or are a run of one character."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return True
    return len(text) > 3 and len(set(text.strip())) <= 1
