"""Draws which tokens of a text surprised a model: pieces with their nats come in, HTML goes out.

A piece is a token, or the tokens that one character is made of; its colour goes from none to red
with its nats, and the pointer upon it is told nats, probability and rank of each token. Every text
is escaped; what is no number counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pretrain.report.document import document
from pretrain.report.run import Record, number
from pretrain.report.units import axis_number, count, text

# The reddest: a probability of 1 in 22,000.
MOST_NATS = 10.0
_LINE_END = '<i aria-hidden="true">↵</i>\n'


def heat_map(pieces: Sequence[Record]) -> str:
    """A legend, and the text with its colours."""
    drawn = "".join(_piece(piece) for piece in pieces)
    legend = (
        '<p class="heat-legend"><span>0 nats: foreseen</span><span class="scale"></span>'
        f"<span>{MOST_NATS:g} nats or more: 1 in {count(round(math.exp(MOST_NATS), -3))}</span></p>"
    )
    return f'{legend}<p class="sample heat" dir="auto">{drawn}</p>' if drawn else ""


def _piece(piece: Record) -> str:
    nats, ranks = _numbers(piece.get("nats")), _numbers(piece.get("ranks"))
    share = min(max(sum(nats), 0.0) / MOST_NATS, 1.0)
    told = "; ".join(
        f"{n:.2f} nats, probability {axis_number(math.exp(-max(n, 0.0)), 3)}, rank {count(rank)}"
        for n, rank in zip(nats, ranks, strict=False)
    )
    # Without a sign of its own the end of a line would have no place for its colour.
    shown = text(piece.get("text", "")).replace("\n", _LINE_END)
    return f'<span style="--n:{share:.2f}" title="{told}">{shown}</span>'


def _numbers(values: object) -> list[float]:
    return [number(value) or 0.0 for value in values] if isinstance(values, list) else []


def heat_map_page(texts: Mapping[str, Sequence[Record]], *, model: str, note: str) -> str:
    """A whole page with the heat map of each text, by name."""
    body = "".join(
        f"<section><h2>{text(name)}</h2>{_mean(pieces)}{heat_map(pieces)}</section>\n"
        for name, pieces in texts.items()
    )
    head = f'<header><h1>What surprised {text(model)}</h1><p class="lead">{text(note)}</p></header>'
    return document(f"What surprised {model}", f"{head}\n{body}")


def _mean(pieces: Sequence[Record]) -> str:
    nats = [n for piece in pieces for n in _numbers(piece.get("nats"))]
    mean = f"{sum(nats) / len(nats):.3f} nats each" if nats else "nothing"
    return f'<p class="lead">{count(len(nats))} tokens, {mean}</p>'
