"""JSON lines, JSON, CSV and Parquet -> rows, one for each record -> documents.

All but JSON are read in constant memory. Lines end at the byte `\n` and nowhere else. The field
with the text is given, or detected in the first records. A record that is not valid UTF-8, strict
JSON or CSV, that does not match the table's header, is too long or has no text, is skipped and
reported with its line number and byte offset.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pretrain import needs_package
from pretrain.corpus.documents import MAX_DETAILED_PROBLEMS, Document
from pretrain.corpus.files import FileStream, Format, compression_of
from pretrain.fileio import unique_keys, without_surrogates

MAX_RECORD_BYTES = 1 << 26
"""A longer record is skipped: no document has 64 MiB, and a decompression bomb never ends."""
MAX_JSON_BYTES = 1 << 28
PREFERRED_TEXT_FIELDS = ("text", "content", "body", "document", "story", "raw_content", "passage")
TITLE_FIELDS = ("title", "headline", "name")
EVERY_FIELD = "\0"
"""As `text_field`: all strings of a record at any depth, joined by this character."""
_PROBE_ROWS = 20
_PROBE_BYTES = 1 << 23
_PARQUET_ROWS = 256
_STRING_TYPE = re.compile(r"(dictionary<values=)?(large_)?string")
"""Names of pyarrow's string types; also matches `string_view`."""
_JSON_TYPES = {
    "NoneType": "null",
    "str": "a string",
    "list": "a list",
    "dict": "an object",
    "bool": "a boolean",
    "int": "a number",
    "float": "a number",
}


class Skipped(str):
    """The reason why a record is not a document."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file, or why it cannot be read."""

    number: int
    """Line of a jsonl or csv file, number of a Parquet or JSON record, from 1."""
    offset: int | None
    """First byte of the record in the (decompressed) file, if the format has such an offset."""
    record: dict[str, Any] | Skipped
    n_bytes: int = 0


def read_records(
    rows: Iterator[Row], stream: FileStream, text_field: str | None
) -> Iterator[Document]:
    """Yield the documents among the records of a file, in their order."""
    name = stream.file.name
    probe: list[Row] = []
    records: list[dict[str, Any]] = []
    n_probe_bytes = 0
    for row in rows:
        if not isinstance(row.record, Skipped):
            records.append(row.record)
        elif not records:
            stream.n_record_bytes += row.n_bytes
            skip_record(stream, row.record, row.number, row.offset, row.n_bytes)
            continue
        # Later bad rows are kept in the probe, so that problems are reported in the order of rows.
        probe.append(row)
        n_probe_bytes += row.n_bytes
        if len(probe) == _PROBE_ROWS or n_probe_bytes > _PROBE_BYTES:
            break

    field = text_field if text_field is not None else _find_text_field(records)
    strings = {key for record in records for key in record if isinstance(record[key], str)}
    title_field = next((key for key in TITLE_FIELDS if key != field and key in strings), None)
    text_fields = stream.report.text_fields
    if field is not None and len(text_fields) < MAX_DETAILED_PROBLEMS:
        text_fields[name] = field

    for row in chain(probe, rows):
        record, number, offset = row.record, row.number, row.offset
        stream.n_record_bytes += row.n_bytes
        text = record if isinstance(record, Skipped) else _text(record, field)
        if isinstance(record, Skipped) or isinstance(text, Skipped):
            skip_record(stream, text, number, offset, row.n_bytes)
            continue

        valid_text = without_surrogates(text)
        if valid_text != text:
            reason = "a lone surrogate was replaced by U+FFFD"
            stream.add_problem(reason, line=number, offset=offset, counter="n_repaired")
        id_ = record.get("id")
        title = record.get(title_field) if title_field else None
        yield Document(
            id=str(id_) if isinstance(id_, str | int) else f"{name}:{number}",
            text=valid_text.replace("\r\n", "\n"),
            title=title if isinstance(title, str) else "",
            source=name,
            offset=offset or 0,
        )


def skip_record(
    stream: FileStream, reason: str, number: int, offset: int | None, n_bytes: int
) -> None:
    """Report a record that is not a document."""
    stream.add_problem(
        f"skipped: {reason}",
        line=number,
        offset=offset,
        counter="n_skipped_records",
        n_bytes=n_bytes,
    )


def _find_text_field(records: list[dict[str, Any]]) -> str | None:
    """The field with the text: a preferred name that is a string in most records, else the field
    with the longest strings."""
    counts, lengths = Counter[str](), Counter[str]()
    for record in records:
        for name, value in record.items():
            if isinstance(value, str):
                counts[name] += 1
                lengths[name] += len(value)
    for name in PREFERRED_TEXT_FIELDS:
        if 2 * counts[name] > len(records):
            return name
    return max(lengths, key=lambda name: lengths[name], default=None)


def _text(record: dict[str, Any], field: str | None) -> str:
    """The text of a record, or `Skipped` with the reason why it has no text."""
    if field == EVERY_FIELD:
        return EVERY_FIELD.join(_strings(record)) or Skipped("no field is a string")
    if field is None:
        return Skipped("no field is a string")
    if field not in record:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        return Skipped(f"no field {field!r}; its fields are {names}")
    value = record[field]
    if not isinstance(value, str):
        return Skipped(f"field {field!r} is {_json_type(value)}, not a string")
    return value if value.strip() else Skipped(f"field {field!r} is empty")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


# Lines: JSON lines and CSV


def _decode(data: bytes, offset: int) -> str:
    """The text of bytes that start at `offset`, or `Skipped`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Skipped(f"invalid UTF-8 at byte {offset + error.start}: {error.reason}")


def _read_lines(stream: FileStream) -> Iterator[tuple[int, int, bytes, str]]:
    """Yield the number of each line, from 1; its first byte in the decompressed file; its bytes
    without the newline, of a line that is too long only the end; and its text, or `Skipped`.

    A line without a newline is the last, unless it is blank or damaged.
    """
    number = 1
    offset = 0
    while data := stream.readline(MAX_RECORD_BYTES + 1):
        n_bytes = len(data)
        while not data.endswith(b"\n") and (more := stream.readline(MAX_RECORD_BYTES + 1)):
            data = more
            n_bytes += len(data)
        has_newline = data.endswith(b"\n")
        is_too_long = n_bytes - has_newline > MAX_RECORD_BYTES
        if not has_newline and (stream.damage or not (is_too_long or data.strip())):
            return
        if number == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        data = data.removesuffix(b"\n")
        too_long = Skipped(f"a line of more than {MAX_RECORD_BYTES:,} bytes")
        yield number, offset, data, too_long if is_too_long else _decode(data, offset)
        number += 1
        offset += n_bytes


def _jsonl_rows(stream: FileStream, text_field: str | None) -> Iterator[Row]:
    """Yield a row for each line that is not blank."""
    for number, offset, data, text in _read_lines(stream):
        if isinstance(text, Skipped) or data.strip():
            yield Row(number, offset, _as_record(_parse_json(text)), len(data))


def _as_record(value: Any) -> dict[str, Any] | Skipped:
    if isinstance(value, dict | Skipped):
        return value
    return Skipped(f"{_json_type(value)}, not an object")


def _json_type(value: object) -> str:
    """The JSON name of a value's type, with its article."""
    return _JSON_TYPES.get(type(value).__name__, "a value")


def _parse_json(text: str) -> Any:
    """The value of strict JSON, or `Skipped`."""

    def reject_constant(name: str) -> object:
        raise ValueError(f"{name} is not JSON")

    if isinstance(text, Skipped):
        return text
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=reject_constant)
    except RecursionError:
        return Skipped("invalid JSON: nested too deeply")
    except ValueError as error:
        return Skipped(f"invalid JSON: {error}")


def _csv_rows(stream: FileStream, text_field: str | None) -> Iterator[Row]:
    """Yield a row for each record below the header; its place is that of its first line."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    # csv.reader pulls lines until a quoted field ends, and after an error it continues with the
    # next line. These have the place of the record's first line, and why one of them is invalid.
    places: list[tuple[int, int]] = []
    errors: list[Skipped] = []
    end = 0

    def decoded_lines() -> Iterator[str]:
        nonlocal end
        for number, offset, data, text in _read_lines(stream):
            end = offset + len(data)
            if not places:
                places.append((number, offset))
            if isinstance(text, Skipped):
                errors[:] = [text]
                text = data.decode("utf-8", "replace")
            yield text + "\n"

    lines = decoded_lines()
    for header_line in lines:
        if header_line.strip():
            break
        places.clear()
    else:
        return
    errors.clear()  # invalid bytes in the header are kept as U+FFFD
    delimiter = "\t" if ".tsv" in stream.file.path.suffixes else max(",;\t|", key=header_line.count)

    header: list[str] | None = None
    reader = csv.reader(chain([header_line], lines), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            cells = []
            errors.append(Skipped(f"invalid CSV: {error}"))
        if cells is None:
            return
        n_bytes = end - places[0][1] if places else 0
        if errors:
            yield Row(*places[0], errors[0], n_bytes)
        elif header is None:
            # A name that repeats an earlier one gets its column's number.
            names = [cell.strip() for cell in cells]
            header = [f"{name}_{i}" if name in names[:i] else name for i, name in enumerate(names)]
        elif cells and len(cells) != len(header):
            reason = f"{len(cells)} cells, but the header has {len(header)}"
            yield Row(*places[0], Skipped(reason), n_bytes)
        elif cells:
            yield Row(*places[0], dict(zip(header, cells, strict=True)), n_bytes)
        places.clear()
        errors.clear()


# JSON and Parquet


def _json_rows(stream: FileStream, text_field: str | None) -> Iterator[Row]:
    """Yield a row for each object of a JSON file.

    The objects are those of its list; or, if it is an object without text of its own and with a
    single list of objects, those of that list; or itself. The file is read into memory, therefore
    it has a size limit; JSON lines have none.
    """
    data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        reason = f"JSON of more than {MAX_JSON_BYTES:,} bytes; convert it to JSON lines"
        yield Row(1, 0, Skipped(reason))
        return
    value = _parse_json(_decode(data.removeprefix(codecs.BOM_UTF8), 0))
    values = value if isinstance(value, list) else [value]
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list)]
        names = PREFERRED_TEXT_FIELDS if text_field is None else (text_field,)
        has_text = text_field == EVERY_FIELD or any(isinstance(value.get(n), str) for n in names)
        if not has_text and len(lists) == 1 and any(isinstance(each, dict) for each in lists[0]):
            values = lists[0]
    n_bytes = len(data) // max(1, len(values))
    for number, each in enumerate(values, start=1):
        yield Row(number, 0 if isinstance(each, Skipped) else None, _as_record(each), n_bytes)


def _parquet_rows(stream: FileStream, text_field: str | None) -> Iterator[Row]:
    """Yield a row for each record with its strings and its id; `number` counts from 1."""
    with needs_package("a Parquet file", "pyarrow"):
        from pyarrow import ArrowException, parquet

    number = 0
    path = stream.file.path
    try:
        with open(path, "rb") as raw, tempfile.TemporaryFile() as copy:
            # Parquet is read from its end, so a compressed file is decompressed to a temporary one.
            is_compressed = compression_of(raw.read(8)) != ""
            if is_compressed:
                shutil.copyfileobj(stream, copy)
                copy.seek(0)
            if stream.damage:
                return
            with parquet.ParquetFile(copy if is_compressed else path) as table:
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
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        message = str(error).splitlines()[0][:200]
        reason = f"the Parquet file is broken: {message}; kept the {number:,} records before that"
        stream.add_problem(reason, counter="n_partial_files")


RECORD_FORMATS: dict[Format, Callable[[FileStream, str | None], Iterator[Row]]] = {
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
}
"""The reader of each format."""
