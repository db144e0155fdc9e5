"""Whether a larger text helps a text (data.base)."""

from __future__ import annotations

import numpy as np

from pretrain.data.format import StandingData
from pretrain.model.counts import kneser_ney

_MOST_COUNTED = 1 << 20


def check_base(data: StandingData) -> None:
    """ValueError if the larger text knows nothing of the text, as one in another language: if its
    counts of three tokens predict the held-out text worse than the text's counts of one token."""
    parts = {
        "base": data.base.split("train"),
        "own": data.own.split("train"),
        "val": data.own.split("val"),
    }
    ids = {name: part.read(0, min(part.n_tokens, _MOST_COUNTED)) for name, part in parts.items()}
    n_bytes = data.tokenizer().byte_lengths[ids["val"]].sum()
    bits = {}
    for name, order in (("base", 3), ("own", 1)):
        vocab_size = data.manifest.vocab_size
        *_, p = kneser_ney(ids[name], ids["val"], vocab_size=vocab_size, order=order)
        bits[name] = -np.log2(p).sum() / n_bytes
    if bits["base"] > bits["own"]:
        raise ValueError(
            f"data.base {data.names[0]} does not help here: counts of its tokens give "
            f"{bits['base']:.2f} bits/byte of the held-out text, single tokens of the text itself "
            f"{bits['own']:.2f}; the larger text must be like the text (its language, or code); "
            "train without it"
        )
