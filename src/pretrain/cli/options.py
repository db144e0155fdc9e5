"""Options that several commands have, settings on the command line, and their help text."""

from __future__ import annotations

import argparse
import ast
import inspect
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pretrain.config import SECTIONS
from pretrain.runner.open import MODEL_HELP

_HELP_COLUMN = 34


@dataclass(frozen=True, slots=True)
class Option:
    """An option or an argument of a command, as a row of a table."""

    name: str
    """`--flag METAVAR`; `--flag`, which is a switch without `choices`; or `METAVAR`, an argument"""
    help: str | None
    """without the default, which is added in brackets"""
    default: Any = None
    type: Callable[[str], Any] | None = None
    """needed if there is no default of that type"""
    choices: Sequence[str] | None = None
    nargs: str | None = None
    """argparse's, or "append": the option may be repeated"""
    required: bool = False
    least: float | None = None
    """the smallest number that is accepted"""

    @property
    def key(self) -> str:
        """The name of the value in the parsed arguments."""
        return self.name.split()[0].lstrip("-").replace("-", "_").lower()

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Declare it to argparse."""
        flag, _, metavar = self.name.partition(" ")
        help = self.help
        if help and self.default not in (None, "", ()) and not help.endswith("]"):
            help += f" [{self.default}]"
        if flag.startswith("-") and not metavar and not self.choices:
            parser.add_argument(flag, action="store_true", help=help)
            return
        options: dict[str, Any] = {"help": help, "default": self.default, "choices": self.choices}
        if flag.startswith("-"):
            options |= {"metavar": metavar or None, "required": self.required}
        else:
            flag, options["metavar"] = self.key, None if self.choices else flag
        if self.nargs == "append":
            options |= {"action": "append", "default": []}
        else:
            options["nargs"] = self.nargs
        kind = self.type or (type(self.default) if self.default is not None else str)
        parser.add_argument(flag, type=kind, **options)

    def check(self, args: argparse.Namespace) -> None:
        """Raise ValueError for a number below the least."""
        value = getattr(args, self.key)
        if self.least is not None and value is not None and value < self.least:
            raise ValueError(
                f"--{self.key.replace('_', '-')} is {value}; it must be at least {self.least}"
            )


MODEL = Option("MODEL", MODEL_HELP)
RUN = Option("RUN", "a run directory")
OUT = Option("--out DIR", "a new or empty folder", required=True)
DEVICE = Option("--device DEVICE", "auto, cpu, cuda or mps", "auto")
TEXT_FIELD = Option(
    "--text-field F,...",
    "field of a record that contains the text, or several that are joined, as in "
    "title,post.body or html:body (its text without tags)",
)
SPECIAL = Option(
    "--special",
    "names of special tokens in the text, such as <|endoftext|>, become those tokens",
)
ACCEPT = Option(
    "--accept CHANGE",
    "continue although CHANGE differs, and record it in changes.jsonl; the error message names the "
    "changes; may be repeated",
    nargs="append",
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
