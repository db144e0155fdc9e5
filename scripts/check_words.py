"""Report private words in names, docstrings, comments, messages and docs.

python scripts/check_words.py [FILE or FOLDER ...]      default: src, tests, docs and others

The list is scripts/banned_words.toml. A word of `identifiers` is rejected as a part of a name that
the source defines; an expression of `prose` in docstrings, comments, string literals and docs, code
in backticks and fenced blocks aside. Exit code 1 if anything is found.
"""

from __future__ import annotations

import ast
import fnmatch
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = (
    "src",
    "tests",
    "docs",
    "benchmarks",
    "scripts",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
LIST = tomllib.loads((ROOT / "scripts" / "banned_words.toml").read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    """Print each finding as FILE:LINE word -> replacement; return the exit code."""
    n_found = 0
    for path in files(arguments or [str(ROOT / name) for name in DEFAULT]):
        text = path.read_text(encoding="utf-8")
        name = path.resolve().relative_to(ROOT).as_posix()
        for line, word, instead in findings(name, text):
            print(f"{name}:{line} {word!r} -> {instead}")
            n_found += 1
    if n_found:
        print(f"{n_found} private words; docs/glossary.md has the terms")
    return 1 if n_found else 0


def files(arguments: list[str]) -> Iterator[Path]:
    """Yield the Python, Markdown and YAML files below the arguments."""
    for argument in map(Path, arguments):
        found = sorted(argument.rglob("*")) if argument.is_dir() else [argument]
        yield from (path for path in found if path.suffix in {".py", ".md", ".yaml", ".toml"})


def findings(name: str, text: str) -> list[tuple[int, str, str]]:
    """Return (line, word, replacement) for each private word of one file, in order.

    Args:
        name: The path below the repository, which decides what is allowed in it.
        text: The file's content.
    """
    allowed = [
        word
        for pattern, words in LIST["allowed"].items()
        if fnmatch.fnmatch(name, pattern)
        for word in words
    ]
    found = []
    if name.endswith(".py"):
        for line, identifier in defined_names(text):
            for word in words_of(identifier):
                if word in LIST["identifiers"] and word not in allowed:
                    found.append((line, identifier, LIST["identifiers"][word]))
        pieces = list(python_prose(text))
    else:
        pieces = list(markdown_prose(text)) if name.endswith(".md") else list(hash_comments(text))
    for expression, instead in LIST["prose"].items():
        if expression in allowed:
            continue
        for line, piece in pieces:
            for match in re.finditer(expression, piece):
                offset = piece.count("\n", 0, match.start())
                found.append((line + offset, match[0], instead))
    return sorted(found)


def defined_names(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and name of each class, function, argument and assigned variable."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def words_of(identifier: str) -> list[str]:
    """Split a snake_case or CamelCase name into lower-case words."""
    words = re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", identifier)
    return [word.lower() for word in words]


def python_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield comments and string literals with their lines, code in backticks blanked."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], _without_code(token.string)


def markdown_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield a page without its fenced blocks and code in backticks, which keep their lines."""
    fenced = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    yield 1, _without_code(fenced.sub(lambda match: "\n" * match[0].count("\n"), text))


def hash_comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield the comments of a YAML or TOML file."""
    for number, line in enumerate(text.splitlines(), start=1):
        if "#" in line:
            yield number, line[line.index("#") :]


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
