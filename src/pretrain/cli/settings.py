"""The text of `pretrain train --help` for settings, read from the config classes, so that there is
one truth."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields
from typing import Any

from pretrain.config import SECTIONS, default_of


def settings_help() -> str:
    """Every --section.key with its meaning and default, as the fields' docstrings say."""
    lines = ["settings, in a config file or as --SECTION.KEY VALUE:"]
    for name, kind in SECTIONS.items():
        lines.append(f"\n  {name}")
        meanings = field_docstrings(kind)
        for entry in fields(kind):
            default = default_of(entry)
            shown = "" if default in (None, ()) else f" [{default}]"
            text = f"{meanings.get(entry.name, '')}{shown}"
            wrapped = textwrap.wrap(text, 70, subsequent_indent=" " * 34)
            lines.append(f"    --{f'{name}.{entry.name}':<27} " + "\n".join(wrapped))
    return "\n".join(lines)


def field_docstrings(kind: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            found[statement.target.id] = " ".join(str(following.value.value).split())
    return found
