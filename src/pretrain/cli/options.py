"""Options that several commands have, settings on the command line, and their help text."""

from __future__ import annotations

import argparse
import ast
import inspect
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from pretrain.config import SECTIONS, default_of
from pretrain.runner.open import MODEL_HELP

_HELP_COLUMN = 34


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")


def add_text_field(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-field", metavar="F", help="field of a jsonl record that contains the text"
    )


def add_prompt(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--prompt", default="", metavar="TEXT", help=help)
    add_special(parser, "prompt")


def add_special(parser: argparse.ArgumentParser, where: str) -> None:
    parser.add_argument(
        "--special",
        action="store_true",
        help=f"names of special tokens in the {where}, such as <|endoftext|>, become those tokens",
    )


def add_accept(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="CHANGE",
        help="continue although CHANGE differs, and record it in changes.jsonl; the error message "
        "names the changes; may be repeated",
    )


def names(text: str | None) -> tuple[str, ...]:
    """Return the names in a text such as `a, b`."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def split_settings(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate `--section.key value` and `--section.key=value` from a command's own arguments."""
    settings: list[str] = []
    others: list[str] = []
    remaining = list(args)
    while remaining:
        arg = remaining.pop(0)
        if not arg.startswith("--") or "." not in arg.partition("=")[0]:
            others.append(arg)
            continue
        settings.append(arg)
        if "=" not in arg and remaining:
            settings.append(remaining.pop(0))
    return settings, others


def settings_help() -> str:
    """Return a table of every --section.key with its meaning and default."""
    width = max(40, min(100, shutil.get_terminal_size().columns) - _HELP_COLUMN)
    lines = ["settings, in a config file or as --SECTION.KEY VALUE:"]
    for name, kind in SECTIONS.items():
        lines.append(f"\n  {name}")
        docstrings = field_docstrings(kind)
        for field in fields(kind):
            text = docstrings.get(field.name, "")
            default = default_of(field)
            if default not in (None, ()):
                text += f" [{default}]"
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
