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
from pretrain.corpus.documents import Document, StrictError
from pretrain.corpus.files import compression_of
from pretrain.corpus.records import MAX_RECORD_BYTES, skip_record, without_surrogates
from pretrain.corpus.streams import DamagedStreamError, FileStream

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


def read_html(stream: FileStream) -> Iterator[Document]:
    """Yield the page as one document."""
    data = stream.read(MAX_RECORD_BYTES + 1)
    reason = f"skipped: a page of more than {MAX_RECORD_BYTES:,} bytes"
    if len(data) <= MAX_RECORD_BYTES:
        title, text = html_text(data)
        if text.strip():
            name = stream.file.name
            yield Document(id=name, text=text, title=title, source=name)
            return
        reason = "skipped: a page without text"
    stream.add_problem(reason, counter="n_skipped_files")


def read_warc(stream: FileStream) -> Iterator[Document]:
    """Yield a document for each page of an archive, with the page's URL as its id."""
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError as error:
        raise missing_package("a WARC file", "fastwarc") from error

    types = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    try:
        archive = ArchiveIterator(stream, record_types=types, parse_http=True)
        for number, record in enumerate(archive, start=1):
            offset = record.stream_pos
            content_type = record.http_content_type or record.headers.get("Content-Type") or ""
            is_html = content_type.lower().startswith(_HTML_TYPES)
            is_text = content_type.lower().startswith("text/plain")
            http = record.http_headers
            is_error = http is not None and not 200 <= (http.status_code or 0) < 300
            if is_error or not (is_html or is_text):
                stream.report.n_other_records += 1
                continue

            data = _decode_body(record.reader.read(MAX_RECORD_BYTES + 1), http or {})
            if len(data) > MAX_RECORD_BYTES:
                skip_record(stream, f"more than {MAX_RECORD_BYTES:,} bytes", number, offset)
                continue
            if is_html:
                title, text = html_text(data)
            else:
                charset = _known_charset(record.http_charset)
                title, text = "", data.decode(charset, "replace")
                if text != data.decode(charset, "ignore"):
                    reason = f"bytes that are not {charset} were replaced by U+FFFD"
                    stream.add_problem(reason, line=number, offset=offset, counter="n_repaired")
            if not text.strip():
                reason = "a page without text, or in an unknown content encoding"
                skip_record(stream, reason, number, offset)
                continue
            name = stream.file.name
            url = record.headers.get("WARC-Target-URI") or f"{name}:{number}"
            yield Document(url, text.replace("\r\n", "\n"), title, name, offset or 0)
    except StrictError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if not stream.damage:
            stream.end(DamagedStreamError(f"the WARC file is broken: {error}"), stream.tell())


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
