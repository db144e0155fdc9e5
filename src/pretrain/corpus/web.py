"""Web pages -> documents: HTML files and WARC archives, their main text by resiliparse.

Of an archive the answers of success (2xx) that hold HTML or plain text are read, and the extracted
texts of a WET file; errors, images and the like are no documents and only counted.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pretrain import missing_package
from pretrain.corpus.documents import Document, Problem, ReadingReport
from pretrain.corpus.files import SourceFile, compression_of
from pretrain.corpus.records import MAX_RECORD_BYTES, Row, skip_record, without_surrogates
from pretrain.corpus.streams import ChunkFile, DamagedStreamError, read_chunks

_CHUNK = re.compile(rb"(?:\r\n)?([0-9a-fA-F]{1,8})[^\r\n]{0,99}\r\n")
_HTML_TYPES = ("text/html", "application/xhtml+xml")


def page_text(data: bytes) -> tuple[str, str]:
    """Title and main text of an HTML page, in whatever encoding it declares or seems to have."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import detect_encoding
        from resiliparse.parse.html import HTMLTree
    except ImportError as error:
        raise missing_package("HTML", "resiliparse") from error

    tree = HTMLTree.parse_from_bytes(data, detect_encoding(data) or "utf-8")
    text = extract_plain_text(tree, main_content=True, alt_texts=False, preserve_formatting=True)
    return (tree.title or "").strip(), without_surrogates(text)


def read_html(file: SourceFile, *, report: ReadingReport, strict: bool) -> Iterator[Document]:
    """The page as one document."""
    data = bytearray()
    try:
        for chunk in read_chunks(file, report=report):
            data += chunk
            if len(data) > MAX_RECORD_BYTES:
                break
    except DamagedStreamError as damage:
        report.n_partial_files += 1
        note = f"{damage}; kept the {len(data):,} bytes before that"
        report.add(Problem(file.name, note, offset=len(data)), strict=strict)
    if len(data) > MAX_RECORD_BYTES:
        reason = f"skipped: a page of more than {MAX_RECORD_BYTES:,} bytes"
    else:
        title, text = page_text(bytes(data))
        if text.strip():
            yield Document(id=file.name, text=text, title=title, source=file.name)
            return
        reason = "skipped: a page without text"
    report.n_skipped_files += 1
    report.add(Problem(file.name, reason), strict=strict)


def read_warc(file: SourceFile, *, report: ReadingReport, strict: bool) -> Iterator[Document]:
    """A document for each page of an archive, with the page's address as its id."""
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError as error:
        raise missing_package("a WARC file", "fastwarc") from error

    chunks = ChunkFile(read_chunks(file, report=report))
    kinds = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    number = 0
    try:
        for record in ArchiveIterator(chunks, record_types=kinds, parse_http=True):
            number += 1
            row = Row(number, record.stream_pos, "")
            kind = (record.http_content_type or record.headers.get("Content-Type") or "").lower()
            is_html = kind.startswith(_HTML_TYPES)
            http = record.http_headers
            is_error = http is not None and not 200 <= (http.status_code or 0) < 300
            if is_error or not (is_html or kind.startswith("text/plain")):
                report.n_other_records += 1
                continue
            data = _unpacked(record.reader.read(MAX_RECORD_BYTES + 1), http or {})
            if len(data) > MAX_RECORD_BYTES:
                skip_record(file, row, f"more than {MAX_RECORD_BYTES:,} bytes", report, strict)
                continue
            charset = _known(record.http_charset)
            title, text = page_text(data) if is_html else ("", data.decode(charset, "replace"))
            if not is_html and text != data.decode(charset, "ignore"):
                report.n_repaired += 1
                note = f"what is not {charset} was replaced by U+FFFD"
                report.add(Problem(file.name, note, number, row.offset), strict=strict)
            if not text.strip():
                skip_record(file, row, "a page without text, or packed otherwise", report, strict)
                continue
            address = record.headers.get("WARC-Target-URI") or f"{file.name}:{number}"
            yield Document(address, text.replace("\r\n", "\n"), title, file.name, row.offset or 0)
    except (OSError, ValueError, RuntimeError) as error:
        chunks.damage = chunks.damage or DamagedStreamError(f"the WARC file is broken: {error}")
    if chunks.damage is not None:
        report.n_partial_files += 1
        note = f"{chunks.damage}; kept what came before"
        report.add(Problem(file.name, note, offset=chunks.tell()), strict=strict)


def _known(charset: str | None) -> str:
    """A charset that bytes can be decoded by; UTF-8 where an answer names no such."""
    with suppress(LookupError):
        b"a".decode(charset or "utf-8", "replace")
        return charset or "utf-8"
    return "utf-8"


def _unpacked(data: bytes, http: Any) -> bytes:
    """A body as it was before it was cut into chunks and packed; nothing where it cannot be had.

    Heads lie: many archives keep the head and unpack the body.
    """
    parts, place = [], 0
    if "chunked" in (http.get("Transfer-Encoding") or "").lower():
        while chunk := _CHUNK.match(data, place):
            place = chunk.end() + int(chunk[1], 16)
            parts.append(data[chunk.end() : place])
    data = b"".join(parts) or data
    if compression_of(data) == "gzip":
        with suppress(zlib.error):
            return zlib.decompressobj(31).decompress(data, MAX_RECORD_BYTES + 1)
    return b"" if b"\0" in data and (http.get("Content-Encoding") or compression_of(data)) else data
