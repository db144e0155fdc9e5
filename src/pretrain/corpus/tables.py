"""Tables -> rows: CSV and TSV by the standard library, Parquet by pyarrow.

The first line of a CSV file names its fields. Rows that do not fit it, or that are broken, say so.
"""

from __future__ import annotations

import csv
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pretrain.corpus.documents import Problem, ReadingReport
from pretrain.corpus.files import SourceFile
from pretrain.corpus.formats import compression_of, missing_package
from pretrain.corpus.jsonl import read_lines
from pretrain.corpus.records import EVERY_FIELD, MAX_RECORD_BYTES, Row
from pretrain.corpus.streams import DamagedStreamError, read_chunks

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
