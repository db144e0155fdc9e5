"""Records -> documents: find the fields of text and title, and skip records without text.

The readers of JSON lines, JSON, CSV and Parquet yield a `Row` for each record with its place. The
text field is given, or detected in the first records. A record that is broken or has no text is
skipped and reported with its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pretrain.corpus.documents import Document, Problem, ReadingReport
from pretrain.corpus.files import SourceFile

MAX_RECORD_BYTES = 1 << 26
"""A longer record is skipped: no document has 64 MiB, and a decompression bomb never ends."""
PREFERRED_TEXT_FIELDS = ("text", "content", "body", "document", "story", "raw_content", "passage")
TITLE_FIELDS = ("title", "headline", "name")
EVERY_FIELD = "\0"
"""As `text_field`: all strings of a record at any depth, joined by this character."""
_PROBE_ROWS = 20
_PROBE_BYTES = 1 << 23
_MAX_REPORTED_TEXT_FIELDS = 100


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
    rows: Iterator[Row], file: SourceFile, text_field: str | None, report: ReadingReport
) -> Iterator[Document]:
    """Yield the documents among the records of a file, in their order."""
    probe: list[Row] = []
    records: list[dict[str, Any]] = []
    n_probe_bytes = 0
    for row in rows:
        if not isinstance(row.record, Skipped):
            records.append(row.record)
        elif not records:
            skip_record(file, row, row.record, report)
            continue
        # Later bad rows are kept in the probe, so that problems are reported in the order of rows.
        probe.append(row)
        n_probe_bytes += row.n_bytes
        if len(probe) == _PROBE_ROWS or n_probe_bytes > _PROBE_BYTES:
            break

    field = text_field if text_field is not None else find_text_field(records)
    strings = {name for record in records for name in record if isinstance(record[name], str)}
    title_field = next((n for n in TITLE_FIELDS if n != field and n in strings), None)
    if field is not None and len(report.text_fields) < _MAX_REPORTED_TEXT_FIELDS:
        report.text_fields[file.name] = field

    for row in chain(probe, rows):
        record = row.record
        text = record if isinstance(record, Skipped) else _text(record, field)
        if isinstance(record, Skipped) or isinstance(text, Skipped):
            skip_record(file, row, text, report)
            continue

        valid_text = without_surrogates(text)
        if valid_text != text:
            report.n_repaired += 1
            reason = "a lone surrogate was replaced by U+FFFD"
            report.add(Problem(file.name, reason, row.number, row.offset))
        id_ = record.get("id")
        title = record.get(title_field) if title_field else None
        yield Document(
            id=str(id_) if isinstance(id_, str | int) else f"{file.name}:{row.number}",
            text=valid_text.replace("\r\n", "\n"),
            title=title if isinstance(title, str) else "",
            source=file.name,
            offset=row.offset or 0,
        )


def skip_record(file: SourceFile, row: Row, reason: str, report: ReadingReport) -> None:
    """Report a record that is not a document."""
    report.n_skipped_records += 1
    report.add(Problem(file.name, f"skipped: {reason}", row.number, row.offset))


def find_text_field(records: list[dict[str, Any]]) -> str | None:
    """The field with the text: a preferred name that is a string in most records, else the field
    with the longest strings."""
    lengths: dict[str, int] = {}
    counts: dict[str, int] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, str):
                counts[name] = counts.get(name, 0) + 1
                lengths[name] = lengths.get(name, 0) + len(value)
    for name in PREFERRED_TEXT_FIELDS:
        if 2 * counts.get(name, 0) > len(records):
            return name
    return max(lengths, key=lambda name: lengths[name]) if lengths else None


def has_text(record: dict[str, Any], text_field: str | None) -> bool:
    """Whether an object has a text of its own, so it is a record and not a container of records."""
    names = PREFERRED_TEXT_FIELDS if text_field is None else (text_field,)
    return text_field == EVERY_FIELD or any(isinstance(record.get(name), str) for name in names)


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
        return Skipped(f"field {field!r} is {json_type(value)}, not a string")
    return value if value.strip() else Skipped(f"field {field!r} is empty")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def without_surrogates(text: str) -> str:
    """Replace each lone surrogate by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def json_type(value: object) -> str:
    """The JSON name of a value's type, with its article."""
    names = {"NoneType": "null", "str": "a string", "list": "a list", "dict": "an object"}
    names |= {"bool": "a boolean", "int": "a number", "float": "a number"}
    return names.get(type(value).__name__, "a value")
