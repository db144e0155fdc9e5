"""Options that several commands have, settings on the command line, and their help text."""

from __future__ import annotations

import argparse
import ast
import inspect
import shutil
import textwrap
from dataclasses import fields
from typing import Any

from pretrain.config import SECTIONS
from pretrain.runner.open import MODEL_HELP

_HELP_COLUMN = 34


def option(
    name: str, help: str | None, default: Any = None, *, least: float | None = None, **words: Any
) -> tuple[str, dict[str, Any]]:
    """Return an option or argument as argparse's `add_argument` takes it.

    `name` is `--flag METAVAR`; `--flag`, a switch unless it has choices; or `METAVAR`, an argument.
    The default, whose type the value has, is added to the help in brackets. A number below `least`
    is an error. Other words are argparse's.
    """
    flag, _, metavar = name.partition(" ")
    if help and default not in (None, "") and not help.endswith("]"):
        help += f" [{default}]"
    if not flag.startswith("-"):
        words.setdefault("metavar", None if "choices" in words else flag)
        return flag.lower(), {"help": help, **words}
    if not metavar and "choices" not in words:
        return flag, {"help": help, "action": "store_true"}
    kind = words.pop("type", str if default is None else type(default))

    def convert(text: str) -> Any:
        value = kind(text)
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{text} is too small; it must be at least {least}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in its errors
    own = {"help": help, "default": default, "metavar": metavar or None, "type": convert}
    return flag, {**own, **words}


MODEL = option("MODEL", MODEL_HELP)
RUN = option("RUN", "a run directory")
OUT = option("--out DIR", "a new or empty folder", required=True)
DEVICE = option("--device DEVICE", "auto, cpu, cuda or mps", "auto")
TEXT_FIELD = option(
    "--text-field F,...",
    "field of a record that contains the text, or several that are joined, as in "
    "title,post.body or html:body (its text without tags)",
)
SPECIAL = option(
    "--special",
    "names of special tokens in the text, such as <|endoftext|>, become those tokens",
)
ACCEPT = option(
    "--accept CHANGE",
    "continue although CHANGE differs, and record it in changes.jsonl; the error message names the "
    "changes; may be repeated",
    action="append",
)


def names(text: str | None) -> tuple[str, ...]:
    """Return the names in a text such as `a, b`."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def settings_help() -> str:
    """Return a table of every --section.key with its meaning and default."""
    width = max(40, min(100, shutil.get_terminal_size().columns) - _HELP_COLUMN)
    lines = [
        "settings, in a config file or as --SECTION.KEY VALUE [default; the recipes have others]:"
    ]
    for name, kind in SECTIONS.items():
        lines.append(f"\n  {name}")
        docstrings = field_docstrings(kind)
        for field in fields(kind):
            text = docstrings.get(field.name, "")
            if field.default not in (None, ()):
                text += f" [{field.default}]"
            setting = f"    --{name}.{field.name}"
            wrapped = textwrap.wrap(text, width)
            if len(setting) >= _HELP_COLUMN:
                lines.append(setting)
            else:
                lines.append(setting.ljust(_HELP_COLUMN) + wrapped.pop(0))
            lines += [" " * _HELP_COLUMN + line for line in wrapped]
    return "\n".join(lines)


def field_docstrings(kind: type[Any]) -> dict[str, str]:
    """Return the string under each field of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docstrings = {}
    for statement, next_statement in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(next_statement, ast.Expr)
            and isinstance(next_statement.value, ast.Constant)
        ):
            text = str(next_statement.value.value)
            docstrings[statement.target.id] = " ".join(text.split())
    return docstrings
