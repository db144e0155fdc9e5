"""A look inside a tokenizer: what its entries are, and how a text uses them.

Texts of named sources come in, a report of plain values goes out: bytes a token by source, entries
that the texts never or hardly use (a model cannot learn those), the longest and the strangest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pretrain.tokenizer.tokenizer import Tokenizer

RARE = 100
"""An entry that is seen fewer times is under-trained: its embedding hardly moves from where it
began (Land and Bartolo, "Fishing for Magikarp", 2024, find such entries in most models)."""
SHOWN = 20


def inspect(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Look at a tokenizer, and at what it makes of texts, given as (source, text)."""
    values = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
    ordered = sorted(range(tokenizer.vocab_size), key=lambda id_: -len(values[id_]))
    strange = [id_ for id_ in ordered if len(values[id_]) > 1 and _is_strange(values[id_])]
    report: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "sha256": tokenizer.sha256,
        "longest": [_entry(id_, values[id_]) for id_ in ordered[:SHOWN]],
        "n_strange": len(strange),
        "strangest": [_entry(id_, values[id_]) for id_ in strange[:SHOWN]],
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
    usable = np.array([len(value) > 0 for value in values])
    unused = np.flatnonzero(usable & (counts == 0))
    rare = np.flatnonzero(usable & (counts > 0) & (counts < RARE))
    shown = sorted(unused.tolist(), key=lambda id_: -len(values[id_]))[:SHOWN]
    return report | {
        "sources": sources,
        "n_unused": len(unused),
        "unused": [_entry(id_, values[id_]) for id_ in shown],
        "n_rare": len(rare),
        "rare": [_entry(int(id_), values[id_]) for id_ in rare[np.argsort(counts[rare])][:SHOWN]],
    }


def _entry(id_: int, value: bytes) -> dict[str, Any]:
    return {"id": id_, "bytes": len(value), "text": value.decode("utf-8", "replace")}


def _is_strange(value: bytes) -> bool:
    """Bytes that are no text by themselves, or a run of one character."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return True
    return len(text) > 3 and len(set(text.strip())) <= 1
