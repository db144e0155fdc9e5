"""Records -> documents: which field holds the text, which the title, and what is no document.

Readers of JSON lines, tables and Parquet give `Row`s, a row for each record with its place; the
field that holds the text is given, or found in the first of them. A record that is broken or
without text is skipped and reported with its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pretrain.corpus.documents import Document, Problem, ReadingReport
from pretrain.corpus.files import SourceFile

MAX_RECORD_BYTES = 1 << 26
"""A longer record is skipped: no document is 64 MiB, and a bomb has no end."""
PREFERRED_TEXT_FIELDS = ("text", "content", "body", "document", "story", "raw_content", "passage")
TITLE_FIELDS = ("title", "headline", "name")
EVERY_FIELD = "\0"
"""As the name of the field that holds the text: all strings of a record, however deep, with this
between them."""
_PROBE_ROWS = 20
_PROBE_BYTES = 1 << 23
_MAX_KEPT_TEXT_FIELDS = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file, or why it is none."""

    number: int
    """Line of a jsonl or csv file, number of a Parquet or JSON record, from 1."""
    offset: int | None
    """Where it begins in the (decompressed) file, in bytes, where that means something."""
    found: dict[str, Any] | str
    n_bytes: int = 0


def read_records(
    rows: Iterator[Row],
    file: SourceFile,
    *,
    text_field: str | None,
    report: ReadingReport,
    strict: bool,
) -> Iterator[Document]:
    """The documents among the records of a file, in their order."""
    first: list[Row] = []
    records: list[dict[str, Any]] = []
    n_waiting_bytes = 0
    for row in rows:
        if isinstance(row.found, dict):
            records.append(row.found)
        elif not records:
            skip_record(file, row, row.found, report, strict)
            continue
        # Bad rows wait behind the good ones, so that problems are reported in the order of rows.
        first.append(row)
        n_waiting_bytes += row.n_bytes
        if len(first) == _PROBE_ROWS or n_waiting_bytes > _PROBE_BYTES:
            break
    field = text_field if text_field is not None else find_text_field(records)
    title_field = _find_title_field(records, field)
    if field is not None and len(report.text_fields) < _MAX_KEPT_TEXT_FIELDS:
        report.text_fields[file.name] = field

    for row in chain(first, rows):
        found = row.found
        text = _text(found, field) if isinstance(found, dict) else _Reason(found)
        if isinstance(text, _Reason) or isinstance(found, str):
            skip_record(file, row, text, report, strict)
            continue
        valid = without_surrogates(text)
        if valid != text:
            report.n_repaired += 1
            note = "a lone surrogate was replaced by U+FFFD"
            report.add(Problem(file.name, note, row.number, row.offset), strict=strict)
        own_id = found.get("id")
        title = found.get(title_field, "") if title_field else ""
        yield Document(
            id=str(own_id) if isinstance(own_id, str | int) else f"{file.name}:{row.number}",
            text=valid.replace("\r\n", "\n"),
            title=title if isinstance(title, str) else "",
            source=file.name,
            offset=row.offset or 0,
        )


def find_text_field(records: list[dict[str, Any]]) -> str | None:
    """The field that holds the text: a preferred name that is a string in most records, else the
    longest string."""
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


def holds_text(record: dict[str, Any], text_field: str | None) -> bool:
    """Whether an object has a text itself, and is not only what records lie in."""
    names = PREFERRED_TEXT_FIELDS if text_field is None else (text_field,)
    return text_field == EVERY_FIELD or any(isinstance(record.get(name), str) for name in names)


def _find_title_field(records: list[dict[str, Any]], text_field: str | None) -> str:
    for name in TITLE_FIELDS:
        if name != text_field and any(isinstance(record.get(name), str) for record in records):
            return name
    return ""


def skip_record(
    file: SourceFile, row: Row, reason: str, report: ReadingReport, strict: bool
) -> None:
    report.n_skipped_records += 1
    report.add(Problem(file.name, f"skipped: {reason}", row.number, row.offset), strict=strict)


class _Reason(str):
    """Why a line is no document."""


def _text(record: dict[str, Any], field: str | None) -> str:
    """The text of a record, or the `_Reason` why it has none."""
    if field == EVERY_FIELD:
        return EVERY_FIELD.join(_strings(record)) or _Reason("no field holds a string")
    if field is None:
        return _Reason("no field holds a string")
    if field not in record:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        return _Reason(f"no field {field!r}; its fields are {names}")
    value = record[field]
    if not isinstance(value, str):
        return _Reason(f"field {field!r} is {json_kind(value)}, not a string")
    return value if value.strip() else _Reason(f"field {field!r} is empty")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def without_surrogates(text: str) -> str:
    """A text with U+FFFD in place of each lone surrogate."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def json_kind(value: object) -> str:
    kinds = {"NoneType": "null", "str": "a string", "list": "a list", "dict": "an object"}
    kinds |= {"bool": "a boolean", "int": "a number", "float": "a number"}
    return kinds.get(type(value).__name__, "a value")
