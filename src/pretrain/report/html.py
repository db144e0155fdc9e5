"""HTML pages that load nothing, from the templates of this package.

Every value is escaped, and characters that a page must not contain are replaced: samples are output
of a model, and may contain anything.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup

from pretrain.report import units

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
    for function in (units.count, units.decimal, units.duration, units.short_count, units.size):
        environment.filters[function.__name__] = function
    environment.filters |= {"percent": units.percent, "number": units.number, "repr": repr}
    return environment
