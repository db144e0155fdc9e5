"""HTML pages that load nothing, from the templates of this package; heat maps of a text.

Every value is escaped, and characters that a page must not contain are replaced: samples are output
of a model, and may contain anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup

from pretrain.report import units
from pretrain.report.run import Record
from pretrain.report.units import axis_number, count, number

# Full red: a probability of 1 in 22,000.
MAX_NATS = 10.0
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(value: object) -> object:
    """The value as text without control characters; HTML of our own (Markup) is left as it is."""
    if isinstance(value, Markup):
        return value
    return _UNPRINTABLE.sub("\ufffd", str(value).replace("\r\n", "\n"))


def render(template: str, **values: Any) -> str:
    """Fill in a template; values are escaped unless they are Markup."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pretrain.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # A missing field of a file is shown as nothing, or as a dash by the filters of numbers.
        undefined=ChainableUndefined,
        finalize=printable,
    )
    css = files("pretrain.report").joinpath("page.css").read_text(encoding="utf-8")
    environment.globals |= {"css": Markup(css), "UNKNOWN": units.UNKNOWN}
    for function in (units.count, units.decimal, units.short_count, units.size):
        environment.filters[function.__name__] = function
    # A browser breaks no line between a number and its unit.
    environment.filters["duration"] = lambda s: units.duration(s).replace(" ", "\xa0")
    environment.filters |= {"percent": units.percent, "number": units.number, "repr": repr}
    return environment


def heat_map_data(pieces: Sequence[Record]) -> dict[str, Any]:
    """The values of the macro `heat_map`: pieces of a text, from none to red by their nats. A piece
    is a token, or the tokens that one character consists of; its tooltip has the numbers of each.
    """
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
