"""Which files sources hold: paths come in, a list of readable files goes out.

A folder is walked in the order of relative paths, so the order is the same on every machine; hidden
names are passed over silently, links, pipes and devices inside a folder are written into the
report. Names with * ? or [ are patterns unless a file is called so. A source that does not exist,
is not a regular file or holds no file is a ValueError. What a file holds is told when it is read.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import importlib.resources
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pretrain.corpus.documents import Problem, ReadingReport

BUNDLED = "bundled"
"""The source of this name is the corpus that ships with the package; `./bundled` forces a path."""

Source = str | Path | Sequence[str | Path]
"""A file, a folder, a pattern of them, "bundled", or several of these."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One readable file of a source."""

    path: Path
    name: str
    """Path relative to the source, with `/`, or its name for a source that is one file; behind the
    source itself where there are several."""
    n_bytes: int
    """Size on disk."""
    source_argument: str = ""
    """The source of which it is a part, as it was given."""
    is_named: bool = False
    """Given by name rather than found in a folder: if it cannot be read, that is a mistake."""


def bundled_corpus() -> Path:
    """The corpus that ships with the package: public-domain English, 12.0 MB of text in 371
    documents."""
    return Path(str(importlib.resources.files("pretrain.corpus") / BUNDLED / "english.jsonl.xz"))


def list_files(
    source: Source, *, report: ReadingReport | None = None, strict: bool = False
) -> list[SourceFile]:
    """The files of a source, sorted by relative path, or of several sources one after the other.

    What is passed over in a folder goes into `report`. Raises ValueError where there is nothing to
    read, and for a file that would be read twice.
    """
    given = [source] if isinstance(source, str | Path) else source
    sources = [(str(one), path) for one in given for path in _matches(one)]
    if not sources or "" in given:  # which is the current folder to a Path
        raise ValueError("no source of text is given; legal: files, folders and patterns")
    files: list[SourceFile] = []
    read_as: dict[str, str | Path] = {}
    for name, one in sources:
        for file in _list_one(one, report=report, strict=strict):
            real = os.path.realpath(file.path)
            if real in read_as:
                raise ValueError(
                    f"{str(file.path)!r} would be read twice: as part of {str(read_as[real])!r} "
                    f"and of {str(one)!r}"
                )
            read_as[real] = one
            file = replace(file, source_argument=_written(name), name=_written(file.name))
            if len(sources) > 1:
                place = _written(Path(one).as_posix())
                file = replace(file, name=place if file.is_named else f"{place}/{file.name}")
            files.append(file)
    return files


def _list_one(
    source: str | Path, *, report: ReadingReport | None, strict: bool
) -> list[SourceFile]:
    path = bundled_corpus() if source == BUNDLED else Path(source)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ValueError(_cannot_find(path, error)) from error
    except ValueError as error:
        raise ValueError(f"source {str(source)!r} is not a path: {error}") from error

    if stat.S_ISREG(mode):
        return [SourceFile(path, path.name, os.stat(path).st_size, is_named=True)]
    if not stat.S_ISDIR(mode):
        raise ValueError(
            f"source {str(path)!r} is a {_kind(mode)}, not a regular file; copy it to a file first"
        )

    report = report if report is not None else ReadingReport()
    files: list[SourceFile] = []
    _walk(path, "", files, report, strict)
    if not files:
        raise ValueError(f"folder {str(path)!r} holds no file; {LEGAL}")
    return sorted(files, key=lambda file: file.name)


def _written(name: str) -> str:
    """A name as it can be written as UTF-8; a name on disk may hold any bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _matches(source: str | Path) -> list[str | Path]:
    """The paths that a pattern stands for, sorted; the source itself if it is none."""
    if source == BUNDLED or not glob.has_magic(str(source)) or os.path.lexists(source):
        return [source]
    found = sorted(glob.glob(str(source), recursive=True))
    if not found:
        raise ValueError(f"no file matches the pattern {str(source)!r}")
    return list(found)


# What lies in a folder that this program has written, a run, an imported model or a prepared text:
# a run would read its own records.
_OWN = (
    {"config.yaml", "environment.json", "tokenizer"},
    {"config.yaml", "checkpoints", "tokenizer"},
    {"asked.yaml"},
    {"requested.yaml"},
    {"manifest.json", "report.json", "tokenizer"},
)


def _walk(
    folder: Path, prefix: str, files: list[SourceFile], report: ReadingReport, strict: bool
) -> None:
    # lstat, never stat: a link is not followed (it may lead into a loop, out of the source, or to a
    # text that is read already), and a pipe is not opened (it would block for ever).
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    if any(marks <= {entry.name for entry in ordered} for marks in _OWN):
        if not prefix:
            raise ValueError(
                f"source {str(folder)!r} is what pretrain has written, a run or a prepared text; "
                "a run goes on by pretrain train --resume --run DIR, or pretrain extend DIR"
            )
        report.n_skipped_files += 1
        report.add(Problem(_written(prefix), "skipped: a run or a prepared text"), strict=strict)
        return
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        name = prefix + entry.name
        found = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            _walk(Path(entry.path), name + "/", files, report, strict)
        elif stat.S_ISREG(found.st_mode):
            files.append(SourceFile(Path(entry.path), name, found.st_size))
        else:
            report.n_skipped_files += 1
            report.add(Problem(_written(name), f"skipped: a {_kind(found.st_mode)}"), strict=strict)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "symbolic link",
        stat.S_IFIFO: "pipe",
        stat.S_IFCHR: "device",
        stat.S_IFBLK: "device",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


def _cannot_find(path: Path, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"source {str(path)!r} cannot be read: {error.strerror}"
    text = f"source {str(path)!r} does not exist"
    try:
        names = os.listdir(path.parent)
    except OSError:
        return f"{text}; neither can its folder {str(path.parent)!r} be read"
    near = difflib.get_close_matches(path.name, names, n=3)
    if near:
        text += "; in the same folder there is " + " or ".join(repr(name) for name in near)
    return text


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
