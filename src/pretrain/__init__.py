"""Pre-train a decoder-only Transformer on any text, and show what it learned.

Every number is a pure function of (seed, step, global sample). The rooms of the package lie side by
side in the order of the data: corpus, tokenizer, data, model, optimizer, checkpoint, generate,
evaluate, train, report; `cli` opens them from the command line. Importing this module loads none.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["__version__"]

# The one place of the version: the build reads this line (pyproject.toml, tool.hatch.version).
__version__ = "0.1.0"


def lazily(room: str, **homes: str) -> Callable[[str], Any]:
    """The `__getattr__` of a room: a name is imported when it is asked for. `homes` has for each of
    its files the names in it."""
    found = {name: home for home, names in homes.items() for name in names.split()}

    def attribute(name: str) -> Any:
        if name not in found:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(f"{room}.{found[name]}"), name)

    return attribute


def missing_package(feature: str, package: str, *, extra: str = "formats") -> ValueError:
    """The error for a missing optional package, with the command that installs it."""
    return ValueError(
        f"{feature} needs the package {package}: python -m pip install 'pretrain[{extra}]'"
    )
