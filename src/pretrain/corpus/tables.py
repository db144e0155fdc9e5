"""CSV, TSV, Parquet and Arrow -> rows, one for each record.

All are read in constant memory. `records` makes documents of the rows.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from pretrain import needs_package
from pretrain.corpus.documents import MAX_RECORD_BYTES, Omission
from pretrain.corpus.files import FileStream
from pretrain.corpus.records import (
    EVERY_FIELD,
    PREFERRED_TEXT_FIELDS,
    Line,
    Row,
    Skipped,
    field_names,
    read_lines,
)

_LOOK_LINES = 50
"""Lines of a quoted cell after which it is decided whether its quotation mark opened it."""
_NUMBER = re.compile(r'[^\s"\d]*+\d[^\s"]*+')
"""A cell that is a number or a code."""
_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 26
_ARROW_MAGIC = b"ARROW1\0\0"
_DELIMITER_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?\s*')
"""The first line of a CSV of Excel, which names its delimiter."""
_TEXT_TYPE = re.compile(
    r"(dictionary<values=)?(large_)?(string|binary)|[a-z_]*(list|struct)<(?!.*binary).*string"
)
"""Names of pyarrow's types that may contain text, but no pictures; also matches `string_view`."""


class _Table:
    """The lines of a table, for csv.reader, which pulls lines until a quoted cell ends.

    A cell may begin with a quotation mark that no other one closes; it would swallow all rows up to
    the next mark. `restart` gives them again.
    """

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._again: list[Line] = []
        self.record: list[Line] = []
        """The first lines of the current record, at most one more than _LOOK_LINES."""
        self.end = 0
        self.invalid: Skipped | None = None
        """Why a line of the record is not text."""
        self.delimiter = ","
        self.header: list[str] = []
        self.has_ended = self.is_quoted = False
        """Whether there are no more lines, and whether a quoted cell was read and closed."""

    def __iter__(self) -> _Table:
        return self

    def __next__(self) -> str:
        if len(self.record) == _LOOK_LINES and self.swallows_rows():
            raise StopIteration  # an error for csv.reader, which then begins a new record
        self.has_ended = True
        line = self._again.pop(0) if self._again else next(self._lines)
        self.has_ended = False
        _, offset, data, text = line
        self.end = offset + len(data)
        if len(self.record) <= _LOOK_LINES:
            self.record.append(line)
        if isinstance(text, Skipped):
            self.invalid = text
            text = data.decode("utf-8", "replace")
        return text + "\n"

    def parse(self, texts: Iterable[str]) -> Any:
        return csv.reader(texts, delimiter=self.delimiter, strict=True)

    def swallows_rows(self, *, is_error: bool = False) -> bool:
        """Whether nine in ten lines after the first one are rows, with eight cells or more, that
        begin or end with a number as it does. One row is enough in TSV, as prose hardly has tabs,
        and in a record that csv.reader rejects; there the first line may be without a number."""
        texts = [text for *_, text in self.record[1:] if text.strip()]
        opening = self.record[0][-1].split(self.delimiter)
        numbered = [i for i in (0, -1) if _NUMBER.fullmatch(opening[i])]
        if len(self.header) < 2 or not (numbered or is_error or self.delimiter == "\t"):
            return False
        n_needed = 1 if is_error or self.delimiter == "\t" else 8 / (len(self.header) - 1)

        def is_row(text: str) -> bool:
            cells = text.replace('"', "").split(self.delimiter) if is_error else [""]
            with suppress(csv.Error):
                cells = next(self.parse([text]))
            is_like = all(_NUMBER.fullmatch(cells[i]) for i in numbered)
            return len(cells) == len(self.header) and is_like and not text[0].isspace()

        # The last line of a quoted cell may look like a row, but it has the closing mark.
        n_rows = sum(is_row(text) for text in texts if is_error or f'"{self.delimiter}' not in text)
        # In a record that ends, a stray mark closes at the end of another row, and not of prose.
        is_open = is_error or len(self.record) == _LOOK_LINES
        return n_rows >= max(n_needed, 0.9 * len(texts)) and (
            is_open or is_row(texts[-1].replace('"', ""))
        )

    def restart(self, first: int) -> None:
        """Begin a record, with the lines of the current one from this index on."""
        self._again = self.record[first:] + self._again
        self.record = []
        self.invalid = None


def csv_rows(stream: FileStream, text_field: str | None) -> Iterator[Row]:
    """Yield a row for each record below the header; its place is that of its first line."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    table = _Table(read_lines(stream))
    header_line = ""
    delimiter = "\t" if ".tsv" in stream.file.path.suffixes else ""
    for header_line in table:
        mark = _DELIMITER_LINE.fullmatch(header_line)
        if header_line.strip() and not mark:
            break
        delimiter = mark[1] if mark else delimiter
        table.restart(1)
    table.restart(0)
    table.delimiter = delimiter or max(",;\t|", key=header_line.count)
    reader = table.parse(table)
    while True:
        error = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as raised:
            cells = []
            reason = f"invalid CSV: {raised}"
            error = Skipped("the file ends inside a quoted cell" if table.has_ended else reason)
        number, offset, data, text = table.record[0]
        n_lines = len(table.record)
        is_plain = False
        # If other cells are quoted, this one was cut off; else its mark may be a character.
        is_stray = error is not None and not (table.has_ended and table.is_quoted)
        if 1 < n_lines <= _LOOK_LINES and table.swallows_rows(is_error=is_stray):
            is_plain = True
            reason = "a quotation mark that no other one closes was read as it stands"
            stream.add_problem(reason, line=number, offset=offset, counter="n_repaired")
        elif is_stray and table.delimiter == "\t" and n_lines == 1 and table.header:
            is_plain = True  # TSV has no quotation marks, but some programs write them
        if is_plain:
            error, cells = None, text.split(table.delimiter)
            table.invalid = text if isinstance(text, Skipped) else None
            table.end = offset + len(data)
        header = table.header
        error = (table.invalid or error) if header else error
        if header and cells and len(cells) != len(header):
            error = error or Skipped(f"{len(cells)} cells, but the header has {len(header)}")
        if error:
            yield Row(number, offset, error, table.end - offset)
        elif not header:  # its invalid bytes are kept as U+FFFD
            # A name that repeats an earlier one gets its column's number.
            names = [cell.strip() for cell in cells]
            for i, name in enumerate(names):
                header.append(f"{name}_{i}" if name in names[:i] else name)
            if max(map(len, names)) > 100 or names[0].replace(".", "").isdecimal():
                reason = "the first line, read as names of columns, looks like a record, which is "
                reason += "then not in the text; write names such as id,text into a line above it"
                file = stream.file.name
                stream.report.omit(reason, Omission(reason, "header", 1, 0, [file], is_read=True))
        elif cells:
            table.is_quoted |= '"' in text and text != table.delimiter.join(cells)
            yield Row(number, offset, dict(zip(header, cells, strict=True)), table.end - offset)
        table.restart(1 if is_plain else n_lines)


def arrow_rows(stream: FileStream, text_field: str | None) -> Iterator[Row]:
    """Yield a row for each record of a Parquet file, or of an Arrow file or stream, with the
    columns that may have text, and its id; `number` counts from 1."""
    with needs_package("a Parquet or Arrow file", "pyarrow"):
        from pyarrow import ArrowException, ipc, parquet

    number = 0
    is_parquet = stream.peek().startswith(b"PAR1")
    names = {name.partition(".")[0] for name in field_names(text_field)} | {"id"}

    def columns(schema: Any) -> list[str]:
        texts = [each for each in schema if _TEXT_TYPE.match(str(each.type))]
        # If there are strings, other columns of bytes are pictures or sound.
        strings = {each.name for each in texts if "binary" not in str(each.type)} - {"id"}
        preferred = {each.name for each in texts if each.name in PREFERRED_TEXT_FIELDS}
        chosen = names | ((strings | preferred) or {each.name for each in texts})
        return [each.name for each in schema if text_field == EVERY_FIELD or each.name in chosen]

    def batch_rows(n_bytes: int, n_rows: int) -> int:
        return min(_BATCH_ROWS, max(1, _BATCH_BYTES * max(1, n_rows) // max(1, n_bytes)))

    def batches() -> Iterator[Any]:
        if not is_parquet:
            # After its magic, an Arrow file is an Arrow stream.
            if stream.peek().startswith(_ARROW_MAGIC):
                stream.read(len(_ARROW_MAGIC))
            with ipc.open_stream(stream) as reader:
                for batch in reader:
                    n_rows = batch_rows(batch.nbytes, batch.num_rows)
                    for start in range(0, batch.num_rows, n_rows):
                        yield batch.select(columns(batch.schema)).slice(start, n_rows)
            return
        with stream.unpacked() as path:
            if stream.damage:
                return
            with parquet.ParquetFile(path) as table:
                # Other columns are not read from the disk.
                selected = columns(table.schema_arrow)
                groups = map(table.metadata.row_group, range(table.num_row_groups))
                n_rows = min((batch_rows(g.total_byte_size, g.num_rows) for g in groups), default=1)
                yield from table.iter_batches(batch_size=n_rows, columns=selected)

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
            message = str(error).partition("\n")[0][:200]
            reason = f"the {kind} file is broken: {message}; kept the {number:,} records before it"
            stream.add_problem(reason, counter="n_partial_files")
