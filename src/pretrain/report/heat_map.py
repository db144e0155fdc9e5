"""Heat maps of the loss of each token: pieces of a text with their nats come in, HTML goes out.

A piece is a token, or the tokens that one character consists of. Its colour goes from none to red
with its nats; its tooltip has nats, probability and rank of each token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.report.html import render
from pretrain.report.run import Record
from pretrain.report.units import axis_number, count, number

# Full red: a probability of 1 in 22,000.
MAX_NATS = 10.0


def heat_map_data(pieces: Sequence[Record]) -> dict[str, Any]:
    """What the macro `heat_map` of the templates draws."""
    drawn, all_nats = [], []
    for piece in pieces:
        nats, ranks = _numbers(piece.get("nats")), _numbers(piece.get("ranks"))
        tokens = [
            f"{n:.2f} nats, probability {axis_number(math.exp(-max(n, 0.0)), 3)}, "
            f"rank {count(rank)}"
            for n, rank in zip(nats, ranks, strict=False)
        ]
        drawn.append(
            {
                "lines": str(piece.get("text", "")).replace("\r\n", "\n").split("\n"),
                "share": f"{min(max(sum(nats), 0.0) / MAX_NATS, 1.0):.2f}",
                "title": "; ".join(tokens),
            }
        )
        all_nats += nats
    return {
        "pieces": drawn,
        "n_tokens": len(all_nats),
        "mean": sum(all_nats) / len(all_nats) if all_nats else None,
        "scale": f"{MAX_NATS:g} nats or more: 1 in {count(round(math.exp(MAX_NATS), -3))}",
    }


def _numbers(values: object) -> list[float]:
    return [number(value) or 0.0 for value in values] if isinstance(values, list) else []


def heat_map_page(texts: Mapping[str, Sequence[Record]], *, model: str, note: str) -> str:
    """A page with a heat map of each text, by name."""
    maps = {name: heat_map_data(pieces) for name, pieces in texts.items()}
    return render("heat_map.html", maps=maps, model=model, note=note)
