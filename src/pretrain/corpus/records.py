"""JSON lines and JSON -> rows, and rows of all formats -> documents.

All but JSON are read in constant memory. Lines end at the byte `\n` and nowhere else. The fields
with the text are given, or one is chosen by the first records. A record that is not valid UTF-8,
strict JSON or CSV, that does not match the table's header, is too long or has no text, is skipped
and reported with its line number and byte offset.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pretrain.corpus.documents import (
    MAX_DETAILED_PROBLEMS,
    MAX_RECORD_BYTES,
    Document,
    with_newlines,
)
from pretrain.corpus.files import FileStream
from pretrain.corpus.pages import html_text
from pretrain.fileio import unique_keys, without_surrogates

MAX_JSON_BYTES = 1 << 28
PREFERRED_TEXT_FIELDS = (
    *("text", "content", "body", "document", "story", "raw_content", "passage"),
    *("messages", "conversations", "conversation"),
)
_MESSAGE_FIELDS = ("content", "value", "text")
"""Fields with the text of a message of a chat, or of a part of one."""
TITLE_FIELDS = ("title", "headline", "name")
EVERY_FIELD = "\0"
"""As `text_field`: all strings of a record at any depth, joined by this character."""
AS_HTML = "html:"
"""Before a name in a `text_field`: the field is HTML, and its text is extracted."""
_BETWEEN = "\n\n"
"""Between the texts of several fields, and of the elements of a list."""
_PROBE_ROWS = 20
_PROBE_BYTES = 1 << 23
_MAX_DEPTH = 4
_HTML_TAG = re.compile(r"<(p|br|div|span|a|b|i|em|strong|code|pre|ul|ol|li|h[1-6])\b[^<>]*>", re.I)
_MISSING = object()
_JSON_TYPES = {
    "NoneType": "null",
    "str": "a string",
    "list": "a list",
    "dict": "an object",
    "bool": "a boolean",
    "int": "a number",
    "float": "a number",
}

Line = tuple[int, int, bytes, str]
"""See `read_lines`."""


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
            stream.skip_record(row.record, row.number, row.offset, row.n_bytes)
            continue
        # Later bad rows are kept in the probe, so that problems are reported in the order of rows.
        probe.append(row)
        n_probe_bytes += row.n_bytes
        if len(probe) == _PROBE_ROWS or n_probe_bytes > _PROBE_BYTES:
            break

    if text_field is not None:
        is_name = any(text_field in record for record in records)  # even with a comma in it
        fields = [text_field] if is_name else [each.strip() for each in text_field.split(",")]
    else:
        fields = _find_text_field(records)
    strings = {key for record in records for key in record if isinstance(record[key], str)}
    title_field = next((key for key in TITLE_FIELDS if key not in fields and key in strings), None)
    text_fields = stream.report.text_fields
    if fields and len(text_fields) < MAX_DETAILED_PROBLEMS:
        text_fields[name] = ",".join(fields)
        stream.report.field_details[name] = _details(records, fields)

    for row in chain(probe, rows):
        record, number, offset = row.record, row.number, row.offset
        stream.n_record_bytes += row.n_bytes
        text = record if isinstance(record, Skipped) else _text(record, fields)
        if isinstance(record, Skipped) or isinstance(text, Skipped):
            stream.skip_record(text, number, offset, row.n_bytes)
            continue

        valid_text = without_surrogates(text)
        if valid_text != text:
            reason = "a lone surrogate was replaced by U+FFFD"
            stream.add_problem(reason, line=number, offset=offset, counter="n_repaired")
        id_ = record.get("id")
        title = record.get(title_field) if title_field else None
        yield Document(
            id=str(id_) if isinstance(id_, str | int) else f"{name}:{number}",
            text=with_newlines(valid_text),
            title=title if isinstance(title, str) else "",
            source=name,
            offset=offset or 0,
        )


def field_names(text_field: str | None) -> list[str]:
    """The names of fields in a `text_field`: "title,html:post.body" -> ["title", "post.body"]."""
    return [each.strip().removeprefix(AS_HTML) for each in (text_field or "").split(",") if each]


def _find_text_field(records: list[dict[str, Any]]) -> list[str]:
    """The field with the text, if any: one with a preferred name that is text in most records, or
    text or null; else the only one, or the one with the longest strings other than addresses."""
    n_texts, n_nulls, n_letters = Counter[str](), Counter[str](), Counter[str]()
    for record in records:
        for path, value in _fields(record):
            is_preferred = all(name in PREFERRED_TEXT_FIELDS for name in path.split("."))
            n_nulls[path] += is_preferred and value is None
            text = _text_of(value) if is_preferred or isinstance(value, str | bytes) else None
            if text is not None:
                n_texts[path] += is_preferred
                n_letters[path] += len(text) * _is_prose(text)
    for counts in (n_texts, n_texts + n_nulls):
        found = [path for path, n in counts.items() if 2 * n > len(records)]
        if found:
            rank = PREFERRED_TEXT_FIELDS.index
            return [min(found, key=lambda path: (path.count("."), *map(rank, path.split("."))))]
    return [path for path, n in n_letters.most_common(1) if n or len(n_nulls) == 1]


def _is_prose(text: str) -> bool:
    """Whether a text has several words, or one of letters: not an address, a number or a code."""
    text = text.strip()
    return not text.isascii() or text.isalpha() or len(text.split(maxsplit=1)) > 1


def _fields(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and value of each field; "outer.inner" for those of objects in the record."""
    for name, value in record.items():
        if isinstance(value, dict) and prefix.count(".") < _MAX_DEPTH:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _lookup(record: Any, name: str) -> Any:
    """The value of a field, which may be "outer.inner", or _MISSING."""
    if not isinstance(record, dict) or name in record or "." not in name:
        return record.get(name, _MISSING) if isinstance(record, dict) else _MISSING
    outer, _, inner = name.partition(".")
    return _lookup(record.get(outer), inner)


def _text_of(value: Any, depth: int = _MAX_DEPTH) -> str | None:
    """The text of a string, of UTF-8 bytes, or of a list of texts or of a chat's messages."""
    if isinstance(value, bytes):
        text = _decode(value, 0)
        return None if isinstance(text, Skipped) else text
    if isinstance(value, dict) and depth < _MAX_DEPTH:
        name = next((name for name in _MESSAGE_FIELDS if name in value), "")
        return _text_of(value.get(name), depth - 1)
    if isinstance(value, list) and depth:
        parts = [(each, _text_of(each, depth - 1)) for each in value]
        texts = [text for _, text in parts if text is not None]
        # A part of a message may be a picture, and a message may be a call.
        if all(isinstance(each, dict) for each, text in parts if text is None):
            return _BETWEEN.join(filter(str.strip, texts)) if texts or not value else None
        return None
    return value if isinstance(value, str) else None


def _details(records: list[dict[str, Any]], fields: list[str]) -> dict[str, Any]:
    """What the report says of the chosen fields: see `ReadingReport.field_details`."""
    n_letters = Counter[str]()
    nested = set()
    for path, value in chain.from_iterable(map(_fields, records)):
        text = _text_of(value)
        strings = _strings(value, _MAX_DEPTH) if text is None else [text]
        n_letters[path] += sum(len(each) for each in strings if _is_prose(each))
        nested |= {path} if text is None and value is not None else set()
    names = field_names(",".join(fields))
    n_all = max(1, n_letters.total())
    n_left_out = sum(n for path, n in n_letters.items() if path not in names)
    large = [path for path, n in n_letters.items() if path in names or 20 * n > n_all]
    values = [_lookup(record, fields[0]) for record in records]
    return {
        "percent": round(100 - 100 * n_left_out / n_all, 1),
        "left_out": [path for path in large if path not in names],
        "joined": ",".join(path for path in large if path not in nested),
        "html": all(isinstance(each, str) and _HTML_TAG.search(each) for each in values),
    }


def _text(record: dict[str, Any], fields: list[str]) -> str:
    """The text of a record, or `Skipped` with the reason why it has no text."""
    if fields == [EVERY_FIELD]:
        return EVERY_FIELD.join(_strings(record)) or Skipped("no field is a string")
    texts = []
    for field in fields:
        name = field.removeprefix(AS_HTML)
        value = _lookup(record, name)
        text = _text_of(value)
        if value is _MISSING:
            return Skipped(f"no field {name!r}; its fields are {_names(record)}")
        if text is None and (value is not None or len(fields) == 1):
            reason = f"field {name!r} is {_json_type(value)}, not a string"
            if isinstance(value, dict) and value:
                reason += f"; --text-field {name}.{next(iter(value))} names a field of it"
            return Skipped(reason)
        if text and text.strip():
            texts.append(text if name == field else html_text(text)[1])
    if not fields:
        names = _names(record)
        return Skipped(f"no field is text; its fields are {names}; --text-field NAME takes one")
    return _BETWEEN.join(texts) or Skipped(f"field {fields[0]!r} is empty")


def _names(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, list(record)[:8])) or "none"


def _strings(value: object, depth: int = 1000) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and depth:
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each, depth - 1)


# JSON lines and JSON


def _decode(data: bytes, offset: int) -> str:
    """The text of bytes that start at `offset`, or `Skipped`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 at byte {offset + error.start}: {error.reason}; if all of it is in"
        return Skipped(
            f"{reason} another encoding, convert it first (iconv -f latin1 -t utf-8 FILE)"
        )


def read_lines(stream: FileStream, first: bytes = b"") -> Iterator[tuple[int, int, bytes, str]]:
    """Yield the number of each line, from 1; its first byte in the decompressed file; its bytes
    without the newline, of a line that is too long only the end; and its text, or `Skipped`.

    A line without a newline is the last, unless it is blank or damaged. `first` is the first line
    if it was read already.
    """
    number = 1
    offset = 0
    while data := first or stream.readline(MAX_RECORD_BYTES + 1):
        first = b""
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


def jsonl_rows(stream: FileStream, text_field: str | None, first: bytes = b"") -> Iterator[Row]:
    """Yield a row for each line that is not blank; `first` is as in `read_lines`."""
    for number, offset, data, text in read_lines(stream, first):
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
    plain = text.removeprefix("\x1e")  # before each text of a sequence, RFC 7464
    try:
        return json.loads(plain, object_pairs_hook=unique_keys, parse_constant=reject_constant)
    except RecursionError:
        return Skipped("invalid JSON: nested too deeply")
    except ValueError as error:
        is_more = plain.startswith(("{", "\x1e"), getattr(error, "pos", 0))
        is_jq = plain.strip() == "{" or (str(error).startswith("Extra data") and is_more)
        hint = f"; jq {'--seq ' * (plain != text)}-c . FILE writes each object in one line"
        return Skipped(f"invalid JSON: {error}{hint * is_jq}")


def json_rows(stream: FileStream, text_field: str | None) -> Iterator[Row]:
    """Yield a row for each object of a JSON file.

    The objects are those of its list; or, if it is an object without text of its own and with a
    single list of objects, those of that list; or itself. The file is read into memory, therefore
    it has a size limit; JSON lines have none, and a file whose first line is an object and not the
    last line is read as JSON lines.
    """
    data = stream.readline(MAX_RECORD_BYTES + 1)
    value = _parse_json(_decode(data.removeprefix(codecs.BOM_UTF8), 0))
    if rest := stream.peek(1).strip():
        # The first line may be invalid, but no JSON value has two opening braces in a row.
        if isinstance(value, dict) or (data.startswith(b"{") and rest.startswith(b"{")):
            yield from jsonl_rows(stream, text_field, data)
            return
        data += stream.read(MAX_JSON_BYTES + 1 - len(data))
        if len(data) > MAX_JSON_BYTES:
            reason = f"JSON of more than {MAX_JSON_BYTES:,} bytes; convert it to JSON lines"
            yield Row(1, 0, Skipped(reason))
            return
        value = _parse_json(_decode(data.removeprefix(codecs.BOM_UTF8), 0))
    values = value if isinstance(value, list) else [value]
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list)]
        names = field_names(text_field) or PREFERRED_TEXT_FIELDS
        has_text = text_field == EVERY_FIELD or any(
            isinstance(_lookup(value, n), str) for n in names
        )
        if not has_text and len(lists) == 1 and any(isinstance(each, dict) for each in lists[0]):
            values = lists[0]
    n_bytes = len(data) // max(1, len(values))
    for number, each in enumerate(values, start=1):
        yield Row(number, 0 if isinstance(each, Skipped) else None, _as_record(each), n_bytes)
