"""A jsonl file -> documents, one JSON object a line, in constant memory.

Lines end at the byte `\\n` and nowhere else. The field that holds the text is given, or found in
the first records. A line that is not UTF-8, not strict JSON, not an object, too long, or without
text is skipped and reported with its line number and byte offset.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pretrain.corpus.documents import Document, Problem, ReadingReport
from pretrain.corpus.files import SourceFile
from pretrain.corpus.streams import DamagedStreamError, read_chunks

MAX_LINE_BYTES = 1 << 26
"""A longer line is skipped: no document is 64 MiB, and a bomb has no newline."""
PREFERRED_TEXT_FIELDS = ("text", "content", "body", "document", "story", "raw_content", "passage")
TITLE_FIELDS = ("title", "headline", "name")
_PROBE_LINES = 20
_PROBE_BYTES = 1 << 23
_MAX_KEPT_TEXT_FIELDS = 100


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    offset: int
    data: bytes
    is_too_long: bool = False


def read_records(
    file: SourceFile, *, text_field: str | None, report: ReadingReport, strict: bool
) -> Iterator[Document]:
    """The documents of a jsonl file, in the order of its lines."""
    lines = _parsed_lines(file, report=report, strict=strict)
    first: list[tuple[_Line, dict[str, Any] | str]] = []
    records: list[dict[str, Any]] = []
    n_waiting_bytes = 0
    for line, found in lines:
        if isinstance(found, dict):
            records.append(found)
        elif not records:
            _skip(file, line, found, report, strict)
            continue
        # Bad lines wait behind the good ones, so that problems are reported in the order of lines.
        first.append((line, found))
        n_waiting_bytes += len(line.data)
        if len(first) == _PROBE_LINES or n_waiting_bytes > _PROBE_BYTES:
            break
    field = text_field if text_field is not None else find_text_field(records)
    title_field = _find_title_field(records, field)
    if field is not None and len(report.text_fields) < _MAX_KEPT_TEXT_FIELDS:
        report.text_fields[file.name] = field

    for line, found in chain(first, lines):
        text = _text(found, field) if isinstance(found, dict) else _Reason(found)
        if isinstance(text, _Reason) or isinstance(found, str):
            _skip(file, line, text, report, strict)
            continue
        valid = without_surrogates(text)
        if valid is not text:
            report.n_repaired += 1
            note = "a lone surrogate was replaced by U+FFFD"
            report.add(Problem(file.name, note, line.number, line.offset), strict=strict)
        own_id = found.get("id")
        title = found.get(title_field, "") if title_field else ""
        yield Document(
            id=str(own_id) if isinstance(own_id, str | int) else f"{file.name}:{line.number}",
            text=valid.replace("\r\n", "\n"),
            title=title if isinstance(title, str) else "",
            source=file.name,
            offset=line.offset,
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


def _find_title_field(records: list[dict[str, Any]], text_field: str | None) -> str:
    for name in TITLE_FIELDS:
        if name != text_field and any(isinstance(record.get(name), str) for record in records):
            return name
    return ""


def _skip(file: SourceFile, line: _Line, reason: str, report: ReadingReport, strict: bool) -> None:
    report.n_skipped_records += 1
    problem = Problem(file.name, f"skipped: {reason}", line.number, line.offset)
    report.add(problem, strict=strict)


class _Reason(str):
    """Why a line is no document."""


def _text(record: dict[str, Any], field: str | None) -> str:
    """The text of a record, or the `_Reason` why it has none."""
    if field is None:
        return _Reason("no field holds a string")
    if field not in record:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        return _Reason(f"no field {field!r}; its fields are {names}")
    value = record[field]
    if not isinstance(value, str):
        return _Reason(f"field {field!r} is {_json_kind(value)}, not a string")
    return value if value.strip() else _Reason(f"field {field!r} is empty")


def without_surrogates(text: str) -> str:
    """The same object if it is valid Unicode, else with U+FFFD in place of each lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _parsed_lines(
    file: SourceFile, *, report: ReadingReport, strict: bool
) -> Iterator[tuple[_Line, dict[str, Any] | str]]:
    """Each line with its object, or with the reason why it has none."""
    for line in _lines(file, report=report, strict=strict):
        if line.is_too_long:
            yield line, f"a line of more than {MAX_LINE_BYTES:,} bytes"
            continue
        try:
            value = _parse(line.data)
        except UnicodeDecodeError as error:
            yield line, f"invalid UTF-8 at byte {line.offset + error.start}: {error.reason}"
        except RecursionError:
            yield line, "invalid JSON: nested too deeply"
        except ValueError as error:
            yield line, f"invalid JSON: {error}"
        else:
            is_object = isinstance(value, dict)
            yield line, value if is_object else f"{_json_kind(value)}, not an object"


def _lines(file: SourceFile, *, report: ReadingReport, strict: bool) -> Iterator[_Line]:
    """The lines that are not blank; a last line without its newline counts."""
    rest: list[bytes] = []
    n_rest = number = offset = 0

    def line(end: bytes, n_dropped: int) -> _Line:
        data = b"".join([*rest, end])
        if number == 1 and data.startswith(codecs.BOM_UTF8):
            data = data[len(codecs.BOM_UTF8) :]
        return _Line(number, offset, data, is_too_long=n_dropped > MAX_LINE_BYTES)

    try:
        for chunk in read_chunks(file, report=report):
            start = 0
            while (stop := chunk.find(b"\n", start)) >= 0:
                number += 1
                n_line = n_rest + stop - start
                found = line(chunk[start:stop], n_line)
                if found.is_too_long or found.data.strip():
                    yield found
                offset += n_line + 1
                rest, n_rest, start = [], 0, stop + 1
            n_rest += len(chunk) - start
            if n_rest > MAX_LINE_BYTES:
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


def _json_kind(value: object) -> str:
    kinds = {"NoneType": "null", "str": "a string", "list": "a list", "dict": "an object"}
    kinds |= {"bool": "a boolean", "int": "a number", "float": "a number"}
    return kinds.get(type(value).__name__, "a value")
