"""JSON lines, JSON, CSV and Parquet -> rows, one for each record.

All but JSON are read in constant memory. Lines end at the byte `\n` and nowhere else. A record that
is not valid UTF-8, strict JSON or CSV, that does not match the table's header, or that is too long
becomes a row with the reason, with its line number and byte offset.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from pretrain import missing_package
from pretrain.corpus.documents import Problem, ReadingReport
from pretrain.corpus.files import SourceFile, compression_of
from pretrain.corpus.records import (
    EVERY_FIELD,
    MAX_RECORD_BYTES,
    Row,
    Skipped,
    has_text,
    json_type,
)
from pretrain.corpus.streams import DamagedStreamError, read_chunks
from pretrain.fileio import unique_keys

MAX_JSON_BYTES = 1 << 28

_PARQUET_ROWS = 256
_STRING_TYPE = re.compile(r"(dictionary<values=)?(large_)?string")
"""Names of pyarrow's string types; also matches `string_view`."""


# Lines


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file, without its newline."""

    number: int
    """From 1."""
    offset: int
    """First byte in the decompressed file."""
    data: bytes
    """Only the end of a line that is too long."""
    is_too_long: bool = False

    @property
    def is_blank(self) -> bool:
        return not self.is_too_long and not self.data.strip()


def read_lines(
    file: SourceFile, report: ReadingReport, *, keep_blank: bool = False
) -> Iterator[Line]:
    """Yield the lines, blank ones only with `keep_blank`; the last line may have no newline."""
    pieces: list[bytes] = []  # the beginning of a line, from earlier chunks
    n_bytes = 0  # its length, also if it is too long to be kept
    number = 1
    offset = 0

    def complete(end: bytes) -> Line:
        data = b"".join(pieces) + end
        if number == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        return Line(number, offset, data, is_too_long=n_bytes + len(end) > MAX_RECORD_BYTES)

    try:
        for chunk in read_chunks(file, report):
            start = 0
            while (stop := chunk.find(b"\n", start)) >= 0:
                line = complete(chunk[start:stop])
                if keep_blank or not line.is_blank:
                    yield line
                number += 1
                offset += n_bytes + stop - start + 1
                pieces, n_bytes = [], 0
                start = stop + 1
            n_bytes += len(chunk) - start
            if n_bytes > MAX_RECORD_BYTES:
                pieces = []
            else:
                pieces.append(chunk[start:])
    except DamagedStreamError as damage:
        report.n_partial_files += 1
        reason = f"{damage}; kept the {number - 1:,} complete lines before that"
        report.add(Problem(file.name, reason, offset=offset))
        return
    line = complete(b"")
    if not line.is_blank:
        yield line


# JSON lines and JSON


def jsonl_rows(file: SourceFile, report: ReadingReport) -> Iterator[Row]:
    """Yield a row for each line that is not blank."""
    record: dict[str, Any] | Skipped
    for line in read_lines(file, report):
        if line.is_too_long:
            record = Skipped(f"a line of more than {MAX_RECORD_BYTES:,} bytes")
        else:
            record = _as_record(_parse_json(line.data, line.offset))
        yield Row(line.number, line.offset, record, len(line.data))


def json_rows(file: SourceFile, text_field: str | None, report: ReadingReport) -> Iterator[Row]:
    """Yield a row for each object of a JSON file.

    The objects are those of its list; or, if it is an object without text of its own and with a
    single list of objects, those of that list; or itself. The file is read into memory, therefore
    it has a size limit; JSON lines have none.
    """
    data = bytearray()
    try:
        for chunk in read_chunks(file, report):
            data += chunk
            if len(data) > MAX_JSON_BYTES:
                reason = f"JSON of more than {MAX_JSON_BYTES:,} bytes; convert it to JSON lines"
                yield Row(1, 0, Skipped(reason))
                return
    except DamagedStreamError as damage:
        report.n_partial_files += 1
        report.add(Problem(file.name, str(damage), offset=len(data)))

    value = _parse_json(bytes(data.removeprefix(codecs.BOM_UTF8)), 0)
    if isinstance(value, Skipped):
        yield Row(1, 0, value)
        return
    values = value if isinstance(value, list) else [value]
    if isinstance(value, dict) and not has_text(value, text_field):
        lists = [each for each in value.values() if isinstance(each, list)]
        if len(lists) == 1 and any(isinstance(each, dict) for each in lists[0]):
            values = lists[0]
    for number, each in enumerate(values, start=1):
        yield Row(number, None, _as_record(each))


def _as_record(value: Any) -> dict[str, Any] | Skipped:
    if isinstance(value, dict | Skipped):
        return value
    return Skipped(f"{json_type(value)}, not an object")


def _parse_json(data: bytes, offset: int) -> Any:
    """The value of strict JSON, or `Skipped`; `offset` is that of `data` in its file."""
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_reject_constant
        )
    except UnicodeDecodeError as error:
        return Skipped(f"invalid UTF-8 at byte {offset + error.start}: {error.reason}")
    except RecursionError:
        return Skipped("invalid JSON: nested too deeply")
    except ValueError as error:
        return Skipped(f"invalid JSON: {error}")


def _reject_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


# CSV and TSV


class _CsvRecord:
    """The lines that csv.reader has consumed for the current record, which may be several."""

    def __init__(self) -> None:
        self.first_line: Line | None = None
        self.error: str | None = None

    def decode(self, lines: Iterable[Line]) -> Iterator[str]:
        """Yield lines as text; note the first one of the record, and why one is invalid."""
        for line in lines:
            if self.first_line is None:
                self.first_line = line
            if line.is_too_long:
                self.error = f"a line of more than {MAX_RECORD_BYTES:,} bytes"
            try:
                text = line.data.decode("utf-8")
            except UnicodeDecodeError as error:
                offset = line.offset + error.start
                self.error = f"invalid UTF-8 at byte {offset}: {error.reason}"
                text = line.data.decode("utf-8", "replace")
            yield text + "\n"


def csv_rows(file: SourceFile, report: ReadingReport) -> Iterator[Row]:
    """Yield a row for each record below the header; its place is that of its first line.

    csv.reader pulls lines until a quoted field ends, so `_CsvRecord` tells which lines it has used.
    After an error it continues with the next line.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    current = _CsvRecord()
    lines = current.decode(read_lines(file, report, keep_blank=True))

    header_line: str | None = "\n"
    while header_line is not None and not header_line.strip():
        current.first_line = None
        header_line = next(lines, None)
    if header_line is None:
        return
    current.error = None  # invalid bytes in the header are kept as U+FFFD
    delimiter = "\t" if ".tsv" in file.path.suffixes else max(",;\t|", key=header_line.count)

    header: list[str] | None = None
    reader = csv.reader(chain([header_line], lines), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            cells = []
            current.error = current.error or f"invalid CSV: {error}"
        if cells is None:
            return
        assert current.first_line is not None
        place = (current.first_line.number, current.first_line.offset)
        if current.error is not None:
            yield Row(*place, Skipped(current.error))
        elif header is None:
            header = _unique_names(cells)
        elif cells and len(cells) != len(header):
            reason = f"{len(cells)} cells, but the header has {len(header)}"
            yield Row(*place, Skipped(reason))
        elif cells:
            n_bytes = sum(len(cell) for cell in cells)
            yield Row(*place, dict(zip(header, cells, strict=True)), n_bytes)
        current.first_line = current.error = None


def _unique_names(cells: list[str]) -> list[str]:
    """The names of a header; a name that repeats an earlier one gets its column's number."""
    names = [cell.strip() for cell in cells]
    return [f"{name}_{i}" if name in names[:i] else name for i, name in enumerate(names)]


# Parquet


def parquet_rows(file: SourceFile, text_field: str | None, report: ReadingReport) -> Iterator[Row]:
    """Yield a row for each record with its strings and its id; `number` counts from 1."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise missing_package("a Parquet file", "pyarrow") from error

    number = 0
    try:
        with _seekable(file) as stream, parquet.ParquetFile(stream) as table:
            # Other columns are not read from the disk.
            columns = [
                column.name
                for column in table.schema_arrow
                if text_field in (column.name, EVERY_FIELD)
                or column.name == "id"
                or _STRING_TYPE.match(str(column.type))
            ]
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    values = record.values()
                    n_bytes = sum(len(v) if isinstance(v, str) else 8 for v in values)
                    yield Row(number, None, record, n_bytes)
    except DamagedStreamError as damage:
        report.n_partial_files += 1
        report.add(Problem(file.name, str(damage)))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        report.n_partial_files += 1
        message = str(error).splitlines()[0][:200]
        reason = f"the Parquet file is broken: {message}; kept the {number:,} records before that"
        report.add(Problem(file.name, reason))
    else:
        report.n_read_bytes += file.n_bytes


@contextmanager
def _seekable(file: SourceFile) -> Iterator[Path | IO[bytes]]:
    """The file, or a temporary copy of a compressed one: Parquet is read from its end."""
    with open(file.path, "rb") as raw:
        is_compressed = compression_of(raw.read(8)) != ""
    if not is_compressed:
        yield file.path
        return
    with tempfile.TemporaryFile() as copy:
        for chunk in read_chunks(file, report=ReadingReport()):
            copy.write(chunk)
        copy.seek(0)
        yield copy
