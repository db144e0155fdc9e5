"""JSON lines and JSON -> rows, the first in constant memory.

Lines end at the byte `\n` and nowhere else. A line that is not UTF-8, not strict JSON, not an
object or too long is a row that says so, with its line number and byte offset.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pretrain import missing_package
from pretrain.corpus.documents import Problem, ReadingReport
from pretrain.corpus.files import SourceFile, compression_of
from pretrain.corpus.records import EVERY_FIELD, MAX_RECORD_BYTES, Row, holds_text, json_kind
from pretrain.corpus.streams import DamagedStreamError, read_chunks

MAX_JSON_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file, without its newline."""

    number: int
    offset: int
    data: bytes
    is_too_long: bool = False


def jsonl_rows(file: SourceFile, *, report: ReadingReport, strict: bool) -> Iterator[Row]:
    """A row for each line that is not blank."""
    for line in read_lines(file, report=report, strict=strict):
        if line.is_too_long:
            found: dict[str, Any] | str = f"a line of more than {MAX_RECORD_BYTES:,} bytes"
        else:
            found = _object(line.data, line.offset)
        yield Row(line.number, line.offset, found, len(line.data))


def json_rows(
    file: SourceFile, *, text_field: str | None, report: ReadingReport, strict: bool
) -> Iterator[Row]:
    """A row for each object of a JSON file: of its list, of the only list in its object where that
    holds objects and the object no text of its own, or itself.

    The file is held in memory, so there is a limit to it; JSON lines have none.
    """
    data = bytearray()
    try:
        for chunk in read_chunks(file, report=report):
            data += chunk
            if len(data) > MAX_JSON_BYTES:
                yield Row(1, 0, f"JSON of more than {MAX_JSON_BYTES:,} bytes; make it JSON lines")
                return
    except DamagedStreamError as damage:
        report.n_partial_files += 1
        report.add(Problem(file.name, str(damage), offset=len(data)), strict=strict)
    found = _value(bytes(data.removeprefix(codecs.BOM_UTF8)), 0)
    if isinstance(found, _Invalid):
        yield Row(1, 0, str(found))
        return
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        is_list = len(lists) == 1 and any(isinstance(each, dict) for each in lists[0])
        found = lists[0] if is_list and not holds_text(found, text_field) else [found]
    for number, value in enumerate(found if isinstance(found, list) else [found], start=1):
        good = isinstance(value, dict)
        yield Row(number, None, value if good else f"{json_kind(value)}, not an object")


class _Invalid(str):
    """Why something is no JSON."""


def _object(data: bytes, offset: int) -> dict[str, Any] | str:
    value = _value(data, offset)
    if isinstance(value, dict | _Invalid):
        return value
    return f"{json_kind(value)}, not an object"


def _value(data: bytes, offset: int) -> Any:
    try:
        return _parse(data)
    except UnicodeDecodeError as error:
        return _Invalid(f"invalid UTF-8 at byte {offset + error.start}: {error.reason}")
    except RecursionError:
        return _Invalid("invalid JSON: nested too deeply")
    except ValueError as error:
        return _Invalid(f"invalid JSON: {error}")


def read_lines(
    file: SourceFile, *, report: ReadingReport, strict: bool, blank: bool = False
) -> Iterator[Line]:
    """The lines, blank ones only if wanted; a last line without its newline counts."""
    rest: list[bytes] = []
    n_rest = number = offset = 0

    def line(end: bytes, n_dropped: int) -> Line:
        data = b"".join([*rest, end])
        if number == 1 and data.startswith(codecs.BOM_UTF8):
            data = data[len(codecs.BOM_UTF8) :]
        return Line(number, offset, data, is_too_long=n_dropped > MAX_RECORD_BYTES)

    try:
        for chunk in read_chunks(file, report=report):
            start = 0
            while (stop := chunk.find(b"\n", start)) >= 0:
                number += 1
                n_line = n_rest + stop - start
                found = line(chunk[start:stop], n_line)
                if blank or found.is_too_long or found.data.strip():
                    yield found
                offset += n_line + 1
                rest, n_rest, start = [], 0, stop + 1
            n_rest += len(chunk) - start
            if n_rest > MAX_RECORD_BYTES:
                rest = []
            else:
                rest.append(chunk[start:])
    except DamagedStreamError as damage:
        report.n_partial_files += 1
        note = f"{damage}; kept the {number:,} whole lines before that"
        report.add(Problem(file.name, note, offset=offset), strict=strict)
        return
    number += 1
    last = line(b"", n_rest)
    if last.is_too_long or last.data.strip():
        yield last


def _parse(data: bytes) -> Any:
    return json.loads(
        data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {double!r} occurs twice")
    return record


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_PARQUET_ROWS = 256
_STRING = re.compile(r"(dictionary<values=)?(large_)?string")
"""How pyarrow calls columns of text; `string_view` too."""


def csv_rows(file: SourceFile, *, report: ReadingReport, strict: bool) -> Iterator[Row]:
    """A row for each record; `number` and `offset` are those of its first line."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = _CsvLines(file, report, strict)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return
    delimiter = "\t" if ".tsv" in file.path.suffixes else _delimiter(first)
    lines.give_back(first)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        lines.begin_record()
        cells: list[str] | str | None
        try:
            cells = next(reader, None)
        except csv.Error as error:
            cells = f"invalid CSV: {error}"
        place = (lines.first_number, lines.first_offset)
        if cells is None:
            return
        if lines.bad is not None:
            yield Row(*place, lines.bad)
        elif isinstance(cells, str):
            yield Row(*place, cells)
        elif header is None:
            names = [name.strip() for name in cells]
            # The first of a name keeps it.
            header = [f"{n}_{i}" if n in names[:i] else n for i, n in enumerate(names)]
        elif cells and len(cells) != len(header):
            yield Row(*place, f"{len(cells)} cells, but the first line names {len(header)}")
        elif cells:
            yield Row(
                *place, dict(zip(header, cells, strict=True)), sum(len(cell) for cell in cells)
            )


class _CsvLines:
    """The lines of a file as text, and where the record that is being read began."""

    def __init__(self, file: SourceFile, report: ReadingReport, strict: bool) -> None:
        self._lines = read_lines(file, report=report, strict=strict, blank=True)
        self._waiting: str | None = None
        self._place = (1, 0)
        self.begin_record()

    def begin_record(self) -> None:
        self.bad: str | None = None
        self.first_number, self.first_offset = self._place
        self._is_first = True

    def give_back(self, line: str) -> None:
        self._waiting = line

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._waiting is not None:
            line, self._waiting = self._waiting, None
            return line
        found = next(self._lines)
        self._place = (found.number, found.offset)
        if self._is_first:
            self.first_number, self.first_offset = self._place
            self._is_first = False
        if found.is_too_long:
            self.bad = f"a line of more than {MAX_RECORD_BYTES:,} bytes"
        try:
            return found.data.decode("utf-8") + "\n"
        except UnicodeDecodeError as error:
            self.bad = f"invalid UTF-8 at byte {found.offset + error.start}: {error.reason}"
            return found.data.decode("utf-8", "replace") + "\n"


def _delimiter(line: str) -> str:
    """The likeliest of four, by the first line."""
    return max(",;\t|", key=line.count)


def parquet_rows(
    file: SourceFile, *, text_field: str | None, report: ReadingReport, strict: bool
) -> Iterator[Row]:
    """A row for each record, with what may be its text, title or id; `number` counts from 1."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise missing_package("a Parquet file", "pyarrow") from error

    number = 0
    try:
        with _seekable(file) as stream, parquet.ParquetFile(stream) as table:
            # The other columns stay on the disk.
            wanted = [
                column.name
                for column in table.schema_arrow
                if text_field in (column.name, EVERY_FIELD)
                or column.name == "id"
                or _STRING.match(str(column.type))
            ]
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(number, None, record, sum(map(_size, record.values())))
    except DamagedStreamError as damage:
        report.n_partial_files += 1
        report.add(Problem(file.name, str(damage)), strict=strict)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        report.n_partial_files += 1
        reason = str(error).splitlines()[0][:200]
        note = f"the Parquet file is broken: {reason}; kept the {number:,} records before that"
        report.add(Problem(file.name, note), strict=strict)
    else:
        report.n_read_bytes += file.n_bytes


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str) else 8


@contextmanager
def _seekable(file: SourceFile) -> Iterator[Path | IO[bytes]]:
    """The file itself, or a temporary copy of a compressed one: Parquet is read from its end."""
    with open(file.path, "rb") as raw:
        is_plain = not compression_of(raw.read(8))
    if is_plain:
        yield file.path
        return
    with tempfile.TemporaryFile() as copy:
        for chunk in read_chunks(file, report=ReadingReport()):
            copy.write(chunk)
        copy.seek(0)
        yield copy
