"""Which files sources hold: paths come in, a list of readable files goes out.

A folder is walked in the order of relative paths, so the order is the same on every machine; hidden
names are passed over silently. Links, pipes and devices inside a folder and files of other kinds
are written into the report; a source that does not exist, is not a regular file or holds nothing
readable is a ValueError.
"""

from __future__ import annotations

import difflib
import importlib.resources
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.corpus.documents import Problem, ReadingReport

BUNDLED = "bundled"
"""The source of this name is the corpus that ships with the package; `./bundled` forces a path."""

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl",)
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard"}
Source = str | Path | Sequence[str | Path]
"""A file, a folder, "bundled", or several of them."""

LEGAL = "legal are .txt, .md and .jsonl, plain or followed by .gz, .bz2, .xz or .zst"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One readable file of a source."""

    path: Path
    name: str
    """Path relative to the source, with `/`, or its name for a source that is one file; behind the
    source itself where there are several."""
    is_records: bool
    """True for jsonl (a document a line), False for text (a document a file)."""
    compression: str
    """One of "", "gzip", "bzip2", "xz", "zstandard"."""
    n_bytes: int
    """Size on disk."""
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
    if isinstance(source, str | Path):
        return _list_one(source, report=report, strict=strict)
    if not source:
        raise ValueError("no source of text is given")
    files: list[SourceFile] = []
    read_as: dict[str, str | Path] = {}
    for one in source:
        for file in _list_one(one, report=report, strict=strict):
            real = os.path.realpath(file.path)
            if real in read_as:
                raise ValueError(
                    f"{str(file.path)!r} would be read twice: as part of {str(read_as[real])!r} "
                    f"and of {str(one)!r}"
                )
            read_as[real] = one
            if len(source) > 1:
                place = Path(one).as_posix()
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
        return [_single_file(path)]
    if not stat.S_ISDIR(mode):
        raise ValueError(
            f"source {str(path)!r} is a {_kind(mode)}, not a regular file; copy it to a file first"
        )

    report = report if report is not None else ReadingReport()
    passed_over: Counter[str] = Counter()
    files: list[SourceFile] = []
    _walk(path, "", files, passed_over, report, strict)
    if not files:
        found = ", ".join(f"{n} x {kind}" for kind, n in sorted(passed_over.items())) or "nothing"
        raise ValueError(f"folder {str(path)!r} holds no readable file (found: {found}); {LEGAL}")
    return sorted(files, key=lambda file: file.name)


def _single_file(path: Path) -> SourceFile:
    file = _source_file(path, path.name)
    if file is None:
        ending = "".join(path.suffixes[-2:]) or "no suffix"
        raise ValueError(
            f"source {str(path)!r}: cannot tell how to read a file with {ending}; {LEGAL}"
        )
    return replace(file, is_named=True)


def _source_file(path: Path, name: str) -> SourceFile | None:
    stem = path.name.lower()
    compression = COMPRESSIONS.get(os.path.splitext(stem)[1], "")
    if compression:
        stem = os.path.splitext(stem)[0]
    suffix = os.path.splitext(stem)[1]
    if suffix not in TEXT_SUFFIXES + RECORD_SUFFIXES:
        return None
    return SourceFile(
        path=path,
        name=name,
        is_records=suffix in RECORD_SUFFIXES,
        compression=compression,
        n_bytes=os.stat(path).st_size,
    )


def _walk(
    folder: Path,
    prefix: str,
    files: list[SourceFile],
    passed_over: Counter[str],
    report: ReadingReport,
    strict: bool,
) -> None:
    # lstat, never stat: a link is not followed (it may lead into a loop, out of the source, or to a
    # text that is read already), and a pipe is not opened (it would block for ever).
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        name = prefix + entry.name
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            _walk(Path(entry.path), name + "/", files, passed_over, report, strict)
            continue

        file = _source_file(Path(entry.path), name) if stat.S_ISREG(mode) else None
        if file is not None:
            files.append(file)
            continue
        kind = os.path.splitext(entry.name)[1] or "no suffix" if stat.S_ISREG(mode) else _kind(mode)
        passed_over[kind] += 1
        report.n_skipped_files += 1
        reason = f"skipped: {LEGAL}" if stat.S_ISREG(mode) else f"skipped: a {_kind(mode)}"
        # A stray README.pdf beside the texts is no fault of the texts: strict is about what was
        # meant to be read.
        report.add(Problem(name, reason), strict=strict and not stat.S_ISREG(mode))


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
