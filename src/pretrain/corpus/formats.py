"""What a file holds, told by its first bytes; its name only breaks ties.

The head of a file (decompressed) and its name come in, one of the formats goes out, or why there is
none. A .txt that holds JSON lines is read as JSON lines, a Parquet file may have any name; but
nobody can tell a table of commas from prose, so .csv and .tsv are believed.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from typing import Literal

Format = Literal["text", "html", "jsonl", "json", "csv", "parquet", "warc"]

HEAD_BYTES = 1 << 16
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard"}
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
}
LEGAL = (
    "what can be read is text, Markdown, HTML, JSON lines, JSON, CSV, TSV, Parquet and WARC, plain "
    "or as .gz, .bz2, .xz or .zst"
)

_BY_NAME: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
}
_HTML = re.compile(
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html[\s>])", re.I | re.S
)
_OBJECT = re.compile(rb'\s*\{\s*"')


def compression_of(head: bytes) -> str:
    """gzip, bzip2, xz, zstandard or "", by the first bytes."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), "")


def format_of(head: bytes, name: str) -> Format | None:
    """The format of a file whose (decompressed) head and name these are; None for what is no
    text."""
    head = head.removeprefix(codecs.BOM_UTF8)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"WARC/"):
        return "warc"
    if b"\0" in head:
        return None
    named = _BY_NAME.get(_suffix(name))
    if named in ("jsonl", "csv"):
        return named
    if _HTML.match(head):
        return "html"
    if _holds_json_lines(head, n_least=2 if named == "json" else 1):
        return "jsonl"
    return named or "text"


def missing_package(what: str, package: str, *, extra: str = "formats") -> ValueError:
    """What to say where an optional package is not installed."""
    return ValueError(
        f"{what} needs the package {package}: python -m pip install 'pretrain[{extra}]'"
    )


def _suffix(name: str) -> str:
    stem, last = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if last in COMPRESSIONS else last


def _holds_json_lines(head: bytes, *, n_least: int) -> bool:
    """Whether the first two lines that are not blank are objects, as far as they can be seen, and
    there are `n_least`."""
    lines = head.split(b"\n")
    rest = lines.pop() if len(head) >= HEAD_BYTES else b""
    lines = [line for line in lines if line.strip()][:2]
    if not lines:
        return n_least == 1 and _OBJECT.match(rest) is not None
    return len(lines) >= n_least and all(map(_is_object, lines))


def _is_object(line: bytes) -> bool:
    if not _OBJECT.match(line):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
