"""CSV, TSV, Parquet and Arrow -> rows, one for each record.

All are read in constant memory. `records` makes documents of the rows.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pretrain import needs_package
from pretrain.corpus.documents import MAX_RECORD_BYTES
from pretrain.corpus.files import FileStream
from pretrain.corpus.records import (
    EVERY_FIELD,
    Line,
    Row,
    Skipped,
    field_names,
    read_lines,
)

_LOOK_LINES = 50
"""Lines of a quoted cell after which it is decided whether its quotation mark opened it."""
_MIN_SWALLOWED_CELLS = 8
_BATCH_ROWS = 256
_ARROW_MAGIC = b"ARROW1\0\0"
_TEXT_TYPE = re.compile(
    r"(dictionary<values=)?(large_)?(string|binary)|[a-z_]*(list|struct)<(?!.*binary).*string"
)
"""Names of pyarrow's types that may contain text, but no pictures; also matches `string_view`."""


class _CsvLines:
    """The lines of a table for csv.reader, which pulls lines until a quoted cell ends.

    A cell of a broken table may begin with a quotation mark that no other one closes; it would
    swallow all rows up to the next mark. `restart` gives them again.
    """

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._again: list[Line] = []
        self.record: list[Line] = []
        """The first lines of the current record, at most one more than _LOOK_LINES."""
        self.end = 0
        self.invalid: Skipped | None = None
        """Why a line of the record is not text."""
        self.is_row: Callable[[str], bool] = lambda text: False
        self.n_needed = 1.0
        self.closing = ""

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        if len(self.record) == _LOOK_LINES and self.swallows_rows():
            raise StopIteration  # an error for csv.reader, which then begins a new record
        line = self._again.pop(0) if self._again else next(self._lines)
        _, offset, data, text = line
        self.end = offset + len(data)
        if len(self.record) <= _LOOK_LINES:
            self.record.append(line)
        if isinstance(text, Skipped):
            self.invalid = text
            text = data.decode("utf-8", "replace")
        return text + "\n"

    def swallows_rows(self, *, is_error: bool = False) -> bool:
        """Whether nine in ten lines after the first one are rows, and at least `n_needed`; one is
        enough in a record that csv.reader rejects."""
        texts = [text for *_, text in self.record[1:] if text.strip()]
        # The last line of a quoted cell may look like a row, but it has the closing mark.
        n_rows = sum(self.is_row(text) for text in texts if is_error or self.closing not in text)
        return n_rows >= max(1 if is_error else self.n_needed, 0.9 * len(texts))

    def restart(self, first: int) -> None:
        """Begin a record, with the lines of the current one from this index on."""
        self._again = self.record[first:] + self._again
        self.record = []
        self.invalid = None


def csv_rows(stream: FileStream, text_field: str | None) -> Iterator[Row]:
    """Yield a row for each record below the header; its place is that of its first line."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = _CsvLines(read_lines(stream))
    header_line = ""
    for header_line in lines:
        if header_line.strip():
            break
        lines.restart(1)
    lines.restart(0)
    is_tsv = ".tsv" in stream.file.path.suffixes
    delimiter = "\t" if is_tsv else max(",;\t|", key=header_line.count)

    def parse(texts: Iterable[str]) -> Any:
        return csv.reader(texts, delimiter=delimiter, strict=True)

    def is_row(text: str) -> bool:
        try:
            return len(next(parse([text]))) == len(header)
        except csv.Error:
            return False

    header: list[str] = []
    reader = parse(lines)
    while True:
        error = None
        try:
            cells = next(reader, None)
        except csv.Error as raised:
            cells = []
            error = Skipped(f"invalid CSV: {raised}")
        if cells is None:
            return
        number, offset, data, text = lines.record[0]
        n_lines = len(lines.record)
        is_short = 1 < n_lines <= _LOOK_LINES
        is_plain = is_short and lines.swallows_rows(is_error=error is not None)
        if is_plain:
            reason = "a quotation mark that no other one closes was read as it stands"
            stream.add_problem(reason, line=number, offset=offset, counter="n_repaired")
        elif error and delimiter == "\t" and n_lines == 1 and header:
            is_plain = True  # TSV has no quotation marks, but some programs write them
        if is_plain:
            error, cells = None, text.split(delimiter)
            lines.invalid = text if isinstance(text, Skipped) else None
            lines.end = offset + len(data)
        error = (lines.invalid or error) if header else error
        n_bytes = lines.end - offset
        if error:
            yield Row(number, offset, error, n_bytes)
        elif not header:  # its invalid bytes are kept as U+FFFD
            # A name that repeats an earlier one gets its column's number.
            names = [cell.strip() for cell in cells]
            header = [f"{name}_{i}" if name in names[:i] else name for i, name in enumerate(names)]
            if len(header) > 1:
                lines.is_row = is_row
                lines.closing = '"' + delimiter
                # Prose may have a comma in each line, but hardly a tab.
                needed = 1 if delimiter == "\t" else _MIN_SWALLOWED_CELLS
                lines.n_needed = needed / (len(header) - 1)
        elif cells and len(cells) != len(header):
            reason = f"{len(cells)} cells, but the header has {len(header)}"
            yield Row(number, offset, Skipped(reason), n_bytes)
        elif cells:
            yield Row(number, offset, dict(zip(header, cells, strict=True)), n_bytes)
        lines.restart(1 if is_plain else n_lines)


def arrow_rows(stream: FileStream, text_field: str | None) -> Iterator[Row]:
    """Yield a row for each record of a Parquet file, or of an Arrow file or stream, with the
    columns that may have text, and its id; `number` counts from 1."""
    with needs_package("a Parquet or Arrow file", "pyarrow"):
        from pyarrow import ArrowException, ipc, parquet

    number = 0
    is_parquet = stream.peek().startswith(b"PAR1")
    names = {name.partition(".")[0] for name in field_names(text_field)} | {"id"}

    def columns(schema: Any) -> list[str]:
        return [
            column.name
            for column in schema
            if text_field == EVERY_FIELD
            or column.name in names
            or _TEXT_TYPE.match(str(column.type))
        ]

    def batches() -> Iterator[Any]:
        if not is_parquet:
            # After its magic, an Arrow file is an Arrow stream.
            if stream.peek().startswith(_ARROW_MAGIC):
                stream.read(len(_ARROW_MAGIC))
            with ipc.open_stream(stream) as reader:
                for batch in reader:
                    for start in range(0, batch.num_rows, _BATCH_ROWS):
                        yield batch.select(columns(batch.schema)).slice(start, _BATCH_ROWS)
            return
        with stream.unpacked() as path:
            if stream.damage:
                return
            with parquet.ParquetFile(path) as table:
                # Other columns are not read from the disk.
                selected = columns(table.schema_arrow)
                yield from table.iter_batches(batch_size=_BATCH_ROWS, columns=selected)

    try:
        for batch in batches():
            for record in batch.to_pylist():
                number += 1
                values = record.values()
                n_bytes = sum(len(v) if isinstance(v, str | bytes) else 8 for v in values)
                yield Row(number, None, record, n_bytes)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        if not stream.damage:
            kind = "Parquet" if is_parquet else "Arrow"
            message = str(error).splitlines()[0][:200]
            reason = f"the {kind} file is broken: {message}; kept the {number:,} records before it"
            stream.add_problem(reason, counter="n_partial_files")
