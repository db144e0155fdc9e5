"""What a file is by its first bytes and its name: the table signatures.toml."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

Kind = dict[str, Any]
"""One entry of signatures.toml, which explains its fields."""


@cache
def _kinds() -> list[Kind]:
    kinds = tomllib.loads(files("pretrain.corpus").joinpath("signatures.toml").read_text())["kind"]
    magic = (re.compile(kind.get("magic", "").encode("latin-1"), re.S) for kind in kinds)
    return [kind | {"magic": pattern} for kind, pattern in zip(kinds, magic, strict=True)]


def kind_of(head: bytes, suffix: str) -> Kind:
    """What a file with these first bytes and this suffix is; empty if that is unknown, or text."""
    for kind in _kinds():
        if suffix in kind.get("names", (suffix,)) and kind["magic"].match(head):
            return kind
    return {}


def promised_kind(suffix: str) -> str:
    """The name of what a file with this suffix must be, or ""."""
    return next((kind["name"] for kind in _kinds() if suffix in kind.get("promises", ())), "")
