"""The files of a source, the format of each, and its bytes: paths in, streams of bytes out.

A folder is walked in the order of relative paths, so the order is the same on every machine. Hidden
names are ignored; links to files are followed; links to folders, pipes and devices inside a folder
are reported as skipped. Names with *, ? or [ are glob patterns unless a file has that name. A
source that does not exist, is not a regular file or contains no file is a ValueError. The format is
detected from the first bytes when a file is read; its name only breaks ties. A stream ends where
its file is damaged; a missing decompressor is a ValueError with the command that installs it.
"""

from __future__ import annotations

import bz2
import codecs
import difflib
import glob
import gzip
import importlib.resources
import io
import json
import lzma
import os
import re
import shutil
import stat
import tempfile
import tomllib
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from pretrain import needs_package
from pretrain.corpus.documents import Counter, Omission, Problem, ReadingReport

BUNDLED = "bundled"
"""Name of the corpus that is installed with the package; `./bundled` forces a path."""

Source = str | Path | Sequence[str | Path]
"""A file, a folder, a glob pattern, "bundled", or several of these."""

SUPPORTED_FORMATS = (
    "readable formats are text, Markdown, HTML, JSON lines, JSON, CSV, TSV, Parquet, Arrow, WARC, "
    "PDF, EPUB, DOCX, ODT, mail, subtitles, notebooks and MediaWiki dumps, plain or as .gz, .bz2, "
    ".xz or .zst"
)

# Files that mark a folder as written by this program: a run, an imported model or a prepared text.
# Read as a corpus, a run would train on its own logs.
_OWN_FOLDERS = (
    {"config.yaml", "environment.json", "tokenizer"},
    {"config.yaml", "checkpoints", "tokenizer"},
    {"asked.yaml"},
    {"requested.yaml"},
    {"manifest.json", "report.json", "tokenizer"},
)
# What `datasets` writes next to its Arrow files.
_DATASET_NOTES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One readable file of a source."""

    path: Path
    name: str
    """Path relative to the source, with `/`, or the file's name if the source is one file. With
    several sources, the source's path comes first."""
    n_bytes: int
    """Size on disk."""
    source_argument: str = ""
    """The source that contains the file, as the user wrote it."""
    is_named: bool = False
    """Whether the user named this file: if it cannot be read, that is an error."""


def bundled_corpus() -> Path:
    """Path of the bundled corpus: public-domain English, 12.0 MB of text in 371 documents."""
    return Path(str(importlib.resources.files("pretrain.corpus") / BUNDLED / "english.jsonl.xz"))


def list_files(source: Source, *, report: ReadingReport | None = None) -> list[SourceFile]:
    """List the files of one source, sorted by relative path, or of several in their order.

    Entries of folders that are skipped are added to `report`. ValueError if there is nothing to
    read, or if a file would be read twice.
    """
    report = report if report is not None else ReadingReport()
    arguments = [source] if isinstance(source, str | Path) else source
    if not arguments or "" in arguments:  # Path("") would be the current folder
        raise ValueError("no source of text; name files, folders or glob patterns")
    sources: list[tuple[str, str | Path]] = []
    for argument in arguments:
        paths: list[str | Path] = [argument]
        if argument != BUNDLED and glob.has_magic(str(argument)) and not os.path.lexists(argument):
            paths = [*sorted(glob.glob(str(argument), recursive=True))]
            if not paths:
                raise ValueError(f"no file matches the pattern {str(argument)!r}")
        sources += [(str(argument), path) for path in paths]

    files: list[SourceFile] = []
    source_of: dict[str, str | Path] = {}
    for argument, path in sources:
        for file in _list_one(path, report):
            real = os.path.realpath(file.path)
            if real in source_of:
                raise ValueError(
                    f"{str(file.path)!r} would be read twice: as part of {str(source_of[real])!r} "
                    f"and of {str(path)!r}"
                )
            source_of[real] = path
            name = _printable(file.name)
            if len(sources) > 1:
                prefix = _printable(Path(path).as_posix())
                name = prefix if file.is_named else f"{prefix}/{name}"
            files.append(replace(file, name=name, source_argument=_printable(argument)))
    return files


def _printable(name: str) -> str:
    """A file name as valid UTF-8; on disk a name may contain any bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _list_one(source: str | Path, report: ReadingReport) -> list[SourceFile]:
    path = bundled_corpus() if source == BUNDLED else Path(source)
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        message = f"source {str(path)!r} does not exist"
        with suppress(OSError):
            similar = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
            if similar:
                message += "; the same folder contains " + " or ".join(map(repr, similar))
        raise ValueError(message) from error
    except OSError as error:
        raise ValueError(f"source {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"source {str(source)!r} must be a path: {error}") from error

    mode = status.st_mode
    if stat.S_ISREG(mode):
        return [SourceFile(path, path.name, status.st_size, is_named=True)]
    if not stat.S_ISDIR(mode):
        raise ValueError(
            f"source {str(path)!r} is a pipe or a device, not a file; copy it to a file first"
        )

    files: list[SourceFile] = []
    links: list[SourceFile] = []
    for file in _walk(path, "", report):
        (links if file.n_bytes < 0 else files).append(file)
    # Caches of the hub, DVC and git-annex consist of links. No file is read twice.
    targets = {os.path.realpath(file.path) for file in files} if links else set()
    for link in links:
        target = os.path.realpath(link.path)
        if target not in targets and os.path.isfile(target):
            targets.add(target)
            files.append(replace(link, n_bytes=os.stat(target).st_size))
        else:
            to = "a file that is read anyway" if target in targets else "a folder or to nothing"
            problem = Problem(_printable(link.name), f"skipped: a symbolic link to {to}")
            report.add(problem, counter="n_skipped_files")
    if not files:
        passed = f", and {len(links):,} symbolic links that lead to none" if links else ""
        raise ValueError(f"folder {str(path)!r} contains no file{passed}; {SUPPORTED_FORMATS}")
    return sorted(files, key=lambda file: file.name)


def _walk(folder: Path, prefix: str, report: ReadingReport) -> Iterator[SourceFile]:
    """Yield the files of a folder, and links with -1 as their size."""
    # lstat, never stat: a link to a folder is not followed, because it may lead into a loop; and a
    # pipe is not opened, because that would block.
    with os.scandir(folder) as iterator:
        entries = sorted(iterator, key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    skip = partial(report.add, counter="n_skipped_files")
    if any(marks <= names for marks in _OWN_FOLDERS):
        if not prefix:
            raise ValueError(
                f"source {str(folder)!r} was written by pretrain: it is a run or a prepared text; "
                "resume a run with pretrain train --resume --run DIR, or with pretrain extend DIR"
            )
        skip(Problem(_printable(prefix), "skipped: a run or a prepared text"))
        return

    notes = _DATASET_NOTES | ({"state.json"} if "dataset_info.json" in names else set())
    for entry in entries:
        name = prefix + entry.name
        if entry.name.startswith("."):
            hidden = Omission("begins with a dot", "hidden name", 1, places=[_printable(name)])
            report.omit("hidden", hidden)
            continue
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(Path(entry.path), name + "/", report)
        elif entry.name in notes:
            skip(Problem(_printable(name), "skipped: it describes a data set"), is_allowed=True)
        elif stat.S_ISREG(status.st_mode) or entry.is_symlink():
            n_bytes = -1 if entry.is_symlink() else status.st_size
            yield SourceFile(Path(entry.path), name, n_bytes)
        else:
            skip(Problem(_printable(name), "skipped: a pipe or a device"))


# Formats

HEAD_BYTES = 1 << 16
"""Bytes of a file from which its format is detected."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard"}
# Also skippable frames (RFC 8878, section 3.1.2), with which pzstd and .warc.zst files begin.
_MAGIC = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<bzip2>BZh)|(?P<xz>\xfd7zXZ\0)"
    rb"|(?P<zstandard>\(\xb5/\xfd|[\x50-\x5f]\*M\x18)"
)
_ZSTD_DICTIONARY = b"\x5d*M\x18"
_HTML = re.compile(
    # Atomic: else the time doubles with each comment.
    rb"\s*(<\?xml[^>]*>\s*)?(?>(<!--.*?-->\s*)*)<(!doctype\s+html|html[\s>])",
    re.I | re.S,
)
_OBJECT = re.compile(rb'[\s\x1e]*\{\s*"')


@cache
def _signatures() -> dict[str, Any]:
    """The content of signatures.toml, which explains it."""
    text = importlib.resources.files("pretrain.corpus").joinpath("signatures.toml").read_text()
    signatures = tomllib.loads(text)
    for kind in signatures["kind"]:
        kind["magic"] = re.compile(kind.get("magic", "").encode("latin-1"), re.S)
    return signatures


@lru_cache(1000)
def _kinds_of(suffix: str) -> tuple[list[dict[str, Any]], re.Pattern[bytes], str]:
    """What a file with this suffix can be, one pattern for all of that, and what it must be."""
    every = _signatures()["kind"]
    kinds = [kind for kind in every if suffix in kind.get("names", (suffix,))]
    promised = next((kind["name"] for kind in every if suffix in kind.get("promises", ())), "")
    return kinds, re.compile(b"|".join(kind["magic"].pattern for kind in kinds), re.S), promised


def compression_of(head: bytes) -> str:
    """gzip, bzip2, xz, zstandard or "", detected from the first bytes."""
    magic = _MAGIC.match(head)
    return str(magic.lastgroup) if magic else ""


def format_of(head: bytes, name: str) -> tuple[str | None, str]:
    """Detect the format from the (decompressed) head and the name of a file: text, html, warc,
    subtitles, a key of `reading.RECORD_FORMATS` or of `publications.READERS`; None if it cannot be
    read. Also returns what the user must know: why not, or what its text is full of.

    A .txt of JSON lines is read as JSON lines, and a Parquet file may have any name. But a table
    cannot be distinguished from prose with commas, so the suffixes .csv and .tsv are trusted.
    """
    head = head.removeprefix(codecs.BOM_UTF8)
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    note = ""
    kinds, any_magic, promised = _kinds_of(suffix)
    if any_magic.match(head):
        kind = next(kind for kind in kinds if kind["magic"].match(head))
        note = "; ".join(kind[key] for key in ("name", "how") if key in kind)
        if "as_written" not in kind:
            return kind.get("format"), note
    if promised:
        return None, f"its name is that of {promised}, but it does not begin like one"
    if b"\0" in head:
        n = head.count(0)
        if 3 * n <= len(head) or len(head.strip(b"\0")) <= len(head) // 2:
            return None, "binary, not text: a NUL byte"
        order = "be" if head[::2].count(0) > head[1::2].count(0) else "le"
        code = f"UTF-{32 if 5 * n > 3 * len(head) else 16}{order}"
        how = f"if it is {code}, convert it first (iconv -f {code} -t utf-8 FILE)"
        return None, f"binary, or {code}: a NUL byte; {how}"

    by_name = _signatures()["suffixes"].get(suffix)
    is_html = _HTML.match(head) is not None
    if is_html and by_name in ("jsonl", "json", "csv"):
        return None, f"its name ends with {suffix}, but it is a page of HTML"
    if by_name in ("jsonl", "csv"):
        return by_name, ""
    if is_html:
        return "html", ""
    if _is_json_lines(head, min_lines=2 if by_name == "json" else 1):
        return "jsonl", ""
    return by_name or "text", note


def _is_json_lines(head: bytes, *, min_lines: int) -> bool:
    """Whether the first two non-blank lines are JSON objects, or the only one.

    If the head is shorter than one line, its beginning decides.
    """
    lines = [line for line in head.split(b"\n") if line.strip()]
    if not _OBJECT.match(head) or len(lines) < min_lines:
        return False
    if len(head) >= HEAD_BYTES:
        lines.pop()  # a part of a line
    try:
        return all(_OBJECT.match(line) and json.loads(line.lstrip(b"\x1e")) for line in lines[:2])
    except (ValueError, RecursionError):
        return False


# Streams: one file -> its bytes, decompressed, UTF-16 and UTF-32 as UTF-8, damage detected. Memory
# stays at a few MiB whatever the compression ratio. The compression is detected from the first
# bytes, not from the name.

CHUNK_BYTES = 1 << 18
# UTF-32 first: its little-endian byte order mark begins with that of UTF-16.
_WIDE_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Text is compressed five to ten times, logs a hundred times: a higher ratio is a bomb.
BOMB_RATIO = 256
BOMB_BYTES = 1 << 26
# zstd can grow 32,000-fold, and its streaming object cannot limit its output: feed it small chunks.
_ZSTD_CHUNK_BYTES = 1 << 12
_MAX_DICTIONARY_BYTES = 1 << 24


class DamagedStreamError(Exception):
    """A compressed file ends too early or is broken; the bytes before that were yielded."""


class FileStream(io.BufferedReader):
    """The (decompressed) bytes of a file, which is opened when they are first read.

    The stream ends where the file is damaged: that is a problem in `report`, and `damage`.
    """

    def __init__(self, file: SourceFile, report: ReadingReport) -> None:
        self.file = file
        self.report = report
        self.damage: DamagedStreamError | None = None
        self.omitted: dict[str, int] = {}
        """Decompressed bytes of what is not in the text, by `Problem.kind`."""
        self.n_record_bytes = 0
        """Decompressed bytes of all records, of a file that consists of records."""
        super().__init__(_RawStream(self), CHUNK_BYTES)

    def add_problem(
        self,
        reason: str,
        *,
        line: int | None = None,
        offset: int | None = None,
        counter: Counter | None = None,
        n_bytes: int = 0,
        is_allowed: bool = False,
    ) -> None:
        """Add a problem of this file to the report, and `n_bytes` to what is not in the text."""
        problem = Problem(self.file.name, reason, line, offset)
        self.report.add(problem, counter=counter, is_allowed=is_allowed)
        if counter != "n_repaired":
            self.omitted[problem.kind] = self.omitted.get(problem.kind, 0) + n_bytes

    @contextmanager
    def unpacked(self) -> Iterator[str]:
        """The path of a file with the (decompressed) bytes, for formats that are read from their
        end."""
        with open(self.file.path, "rb") as raw, tempfile.NamedTemporaryFile() as copy:
            is_compressed = compression_of(raw.read(8)) != ""
            if is_compressed:
                shutil.copyfileobj(self, copy)
                copy.flush()
            yield copy.name if is_compressed else str(self.file.path)

    def skip_file(self, reason: object, *, offset: int | None = None) -> None:
        """Report that the file is not text; ValueError if the user named it."""
        problem = Problem(self.file.name, str(reason), offset=offset)
        if self.file.is_named:
            raise ValueError(f"{problem}; {SUPPORTED_FORMATS}")
        # A picture between the texts is not an error of the texts, so strict mode allows it.
        self.add_problem(problem.reason, offset=offset, counter="n_skipped_files", is_allowed=True)

    def skip_record(self, reason: str, number: int, offset: int | None, n_bytes: int) -> None:
        """Report a record that is not a document."""
        skipped = f"skipped: {reason}"
        self.add_problem(
            skipped, line=number, offset=offset, counter="n_skipped_records", n_bytes=n_bytes
        )

    def omit(self, reason: str, n_bytes: int, *, unit: str) -> None:
        """Count something that is left out although nothing is wrong with it."""
        self.report.omit(reason, Omission(reason, unit, n=1, places=[self.file.name]))
        self.omitted[reason] = self.omitted.get(reason, 0) + n_bytes

    def share_omitted(self, *, has_document: bool) -> None:
        """Add what is not in the text to the report, in bytes on disk. If there is no document at
        all, that is the whole file, for the first reason."""
        n_all = self.n_record_bytes or self.raw.tell() or 1
        for kind, n_bytes in self.omitted.items():
            share = n_bytes / n_all if has_document else kind == next(iter(self.omitted))
            self.report.omit(kind, Omission("", n_bytes=round(share * self.file.n_bytes)))

    def end(self, damage: DamagedStreamError, n_bytes: int) -> None:
        """Report that the file is damaged after this number of bytes."""
        reason = f"{damage}; the {n_bytes:,} bytes before that were read"
        self.add_problem(reason, offset=n_bytes, counter="n_partial_files")
        self.damage = damage


class _RawStream(io.RawIOBase):
    """What a FileStream reads from: it fills the given buffer unless the file ends."""

    def __init__(self, stream: FileStream) -> None:
        super().__init__()
        self._stream = stream
        self._chunks = _read_chunks(stream.file, stream.report)
        self._damage: DamagedStreamError | None = None
        self._rest = memoryview(b"")  # a slice of it copies nothing
        self._position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        n = 0
        while n < len(buffer):
            if not self._rest:
                try:
                    self._rest = memoryview(next(self._chunks))
                except StopIteration:
                    break
                except DamagedStreamError as damage:
                    self._damage = damage
                    break
            part = self._rest[: len(buffer) - n]
            buffer[n : n + len(part)] = part
            self._rest = self._rest[len(part) :]
            n += len(part)
        self._position += n
        # Not before the bytes are used: a binary file is skipped after a look at its first ones.
        if not n and self._damage and not self._stream.damage:
            self._stream.end(self._damage, self._position)
        return n

    def close(self) -> None:
        self._chunks.close()
        super().close()


def _read_chunks(file: SourceFile, report: ReadingReport) -> Generator[bytes, None, None]:
    """Yield the bytes of a file in chunks; adds the bytes on disk to `report.n_read_bytes`."""
    with open(file.path, "rb") as raw:
        n_reported = n_decompressed = 0
        for chunk in _as_utf8(_decompress(raw, file)):
            n_decompressed += len(chunk)
            if n_decompressed > max(BOMB_BYTES, BOMB_RATIO * file.n_bytes):
                raise DamagedStreamError(
                    f"a decompression bomb: more than {BOMB_RATIO} times its size on disk"
                )
            report.n_read_bytes += raw.tell() - n_reported
            n_reported = raw.tell()
            yield chunk


def _as_utf8(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Convert UTF-16 and UTF-32 with a byte order mark to UTF-8; pass on everything else, with
    newlines for carriage returns if there are only those."""
    head = b""
    damage = None
    try:
        while len(head) < HEAD_BYTES and b"\n" not in head and (chunk := next(chunks, b"")):
            head += chunk
    except DamagedStreamError as error:
        damage = error
    chunks = chain([head], chunks)
    encoding = next((e for mark, e in _WIDE_ENCODINGS.items() if head.startswith(mark)), None)
    try:
        if encoding:
            yield from (text.encode() for text in codecs.iterdecode(chunks, encoding))
        elif b"\r" in head[:-1] and not (b"\n" in head or b"\0" in head):
            # Lines of old Macintosh files end at a carriage return alone.
            newlines = io.IncrementalNewlineDecoder(None, translate=True)
            for chunk in chunks:
                yield newlines.decode(chunk.decode("latin-1")).encode("latin-1")
            yield newlines.decode("", final=True).encode("latin-1")
        else:
            yield from chunks
    except UnicodeDecodeError as error:
        reason = f"it starts with the byte order mark of {encoding}, but {error.reason}"
        raise damage or DamagedStreamError(reason) from error
    if damage:
        raise damage


def _decompress(raw: BinaryIO, file: SourceFile) -> Iterator[bytes]:
    compression = compression_of(raw.read(8))
    raw.seek(0)
    expected = COMPRESSIONS.get(os.path.splitext(file.path.name.lower())[1])
    if expected and not compression:
        content = "is empty" if file.n_bytes == 0 else f"does not start like a {expected} file"
        raise DamagedStreamError(f"its name is that of a {expected} file, but it {content}")
    try:
        if compression == "zstandard":
            yield from _decompress_zstandard(raw)
        else:
            openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
            stream: Any = openers[compression](raw) if compression else raw
            # read1, not read: at damage, read would lose the bytes that it has already
            # decompressed.
            yield from iter(partial(stream.read1, CHUNK_BYTES), b"")
    except EOFError as error:
        raise DamagedStreamError(f"the {compression} file is truncated") from error
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise DamagedStreamError(f"the {compression or 'plain'} file is broken: {error}") from error


def _decompress_zstandard(raw: BinaryIO) -> Iterator[bytes]:
    with needs_package("a zstandard file", "zstandard"):
        from zstandard import ZstdCompressionDict, ZstdDecompressor, ZstdError

    # `zstd --long=31` uses the largest window. Memory is only taken as far as a window is filled.
    decompressor = ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    head = raw.read(8)
    try:
        if head.startswith(_ZSTD_DICTIONARY):
            # The first frame has the dictionary of the others, plain or compressed: IIPC, "Use of
            # Zstandard in WARC files", 2021.
            content = raw.read(min(int.from_bytes(head[4:], "little"), _MAX_DICTIONARY_BYTES))
            if compression_of(content) == "zstandard":
                content = decompressor.stream_reader(content).read(_MAX_DICTIONARY_BYTES)
            dictionary = ZstdCompressionDict(content)
            decompressor = ZstdDecompressor(dict_data=dictionary, max_window_size=1 << 31)
        raw.seek(0)
        # zstandard's stream reader does not report a truncated end. Therefore each frame is
        # decompressed by its own object, whose `eof` tells whether it was complete.
        while data := raw.read(_ZSTD_CHUNK_BYTES):
            while data:
                frame = frame or decompressor.decompressobj()
                if chunk := frame.decompress(data):
                    yield chunk
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    except ZstdError as error:
        raise OSError(str(error)) from error
    if frame is not None:
        raise EOFError
