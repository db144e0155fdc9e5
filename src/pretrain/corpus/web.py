"""Web pages -> documents: HTML files and WARC archives, their main text extracted by resiliparse.

Of an archive, successful responses (2xx) with HTML or plain text are read, and the extracted texts
of a WET file. Error responses, images and the like are only counted.
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

_HTTP_CHUNK_SIZE = re.compile(rb"(?:\r\n)?([0-9a-fA-F]{1,8})[^\r\n]{0,99}\r\n")
_HTML_TYPES = ("text/html", "application/xhtml+xml")


def html_text(data: bytes) -> tuple[str, str]:
    """Extract title and main text of an HTML page, in its declared or detected encoding."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import detect_encoding
        from resiliparse.parse.html import HTMLTree
    except ImportError as error:
        raise missing_package("HTML", "resiliparse") from error

    tree = HTMLTree.parse_from_bytes(data, detect_encoding(data) or "utf-8")
    text = extract_plain_text(tree, main_content=True, alt_texts=False, preserve_formatting=True)
    return (tree.title or "").strip(), without_surrogates(text)


def read_html(file: SourceFile, report: ReadingReport) -> Iterator[Document]:
    """Yield the page as one document."""
    data = bytearray()
    try:
        for chunk in read_chunks(file, report):
            data += chunk
            if len(data) > MAX_RECORD_BYTES:
                break
    except DamagedStreamError as damage:
        report.n_partial_files += 1
        reason = f"{damage}; kept the {len(data):,} bytes before that"
        report.add(Problem(file.name, reason, offset=len(data)))

    if len(data) > MAX_RECORD_BYTES:
        reason = f"skipped: a page of more than {MAX_RECORD_BYTES:,} bytes"
    else:
        title, text = html_text(bytes(data))
        if text.strip():
            yield Document(id=file.name, text=text, title=title, source=file.name)
            return
        reason = "skipped: a page without text"
    report.n_skipped_files += 1
    report.add(Problem(file.name, reason))


def read_warc(file: SourceFile, report: ReadingReport) -> Iterator[Document]:
    """Yield a document for each page of an archive, with the page's URL as its id."""
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError as error:
        raise missing_package("a WARC file", "fastwarc") from error

    chunks = ChunkFile(read_chunks(file, report))
    types = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    try:
        archive = ArchiveIterator(chunks, record_types=types, parse_http=True)
        for number, record in enumerate(archive, start=1):
            row = Row(number, record.stream_pos, {})
            content_type = record.http_content_type or record.headers.get("Content-Type") or ""
            is_html = content_type.lower().startswith(_HTML_TYPES)
            is_text = content_type.lower().startswith("text/plain")
            http = record.http_headers
            is_error = http is not None and not 200 <= (http.status_code or 0) < 300
            if is_error or not (is_html or is_text):
                report.n_other_records += 1
                continue

            data = _decode_body(record.reader.read(MAX_RECORD_BYTES + 1), http or {})
            if len(data) > MAX_RECORD_BYTES:
                skip_record(file, row, f"more than {MAX_RECORD_BYTES:,} bytes", report)
                continue
            if is_html:
                title, text = html_text(data)
            else:
                charset = _known_charset(record.http_charset)
                title, text = "", data.decode(charset, "replace")
                if text != data.decode(charset, "ignore"):
                    report.n_repaired += 1
                    reason = f"bytes that are not {charset} were replaced by U+FFFD"
                    report.add(Problem(file.name, reason, number, row.offset))
            if not text.strip():
                reason = "a page without text, or in an unknown content encoding"
                skip_record(file, row, reason, report)
                continue
            url = record.headers.get("WARC-Target-URI") or f"{file.name}:{number}"
            yield Document(url, text.replace("\r\n", "\n"), title, file.name, row.offset or 0)
    except (OSError, ValueError, RuntimeError) as error:
        chunks.damage = chunks.damage or DamagedStreamError(f"the WARC file is broken: {error}")
    if chunks.damage is not None:
        report.n_partial_files += 1
        reason = f"{chunks.damage}; kept the records before that"
        report.add(Problem(file.name, reason, offset=chunks.tell()))


def _known_charset(charset: str | None) -> str:
    """The charset of a response, or UTF-8 if Python has no decoder of that name."""
    with suppress(LookupError):
        b"a".decode(charset or "utf-8", "replace")
        return charset or "utf-8"
    return "utf-8"


def _decode_body(data: bytes, http: Any) -> bytes:
    """Undo the transfer and content encodings of a response body; empty if that is not possible.

    The headers are not reliable: many archives keep the header and decode the body.
    """
    if "chunked" in (http.get("Transfer-Encoding") or "").lower():
        parts = []
        position = 0
        while size := _HTTP_CHUNK_SIZE.match(data, position):
            position = size.end() + int(size[1], 16)
            parts.append(data[size.end() : position])
        data = b"".join(parts) or data
    compression = compression_of(data)
    if compression == "gzip":
        with suppress(zlib.error):
            return zlib.decompressobj(31).decompress(data, MAX_RECORD_BYTES + 1)
    is_encoded = http.get("Content-Encoding") or compression
    return b"" if is_encoded and b"\0" in data else data
