"""Web pages: HTML files and WARC archives -> documents.

The main text is extracted by resiliparse. Of an archive, successful responses (2xx) with HTML or
plain text are read, and the extracted texts of a WET file. Error responses, images and the like are
only counted.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

from pretrain import needs_package
from pretrain.corpus.documents import MAX_RECORD_BYTES, Document, StrictError, with_newlines
from pretrain.corpus.files import DamagedStreamError, FileStream, compression_of
from pretrain.fileio import without_surrogates

_HTTP_CHUNK_SIZE = re.compile(rb"(?:\r\n)?([0-9a-fA-F]{1,8})[^\r\n]{0,99}\r\n")
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")
"""Bytes that are in compressed data, and not in text."""
_LONE_CHARACTER = re.compile(r">(\s*+[^\s<>&]?(?:[^\x00-\x7f\s]|&#?\w+;))(?=\s*<)")
"""All of the text between two tags."""
_BODY = re.compile(r"</head\s*>|<body\b[^<>]*>", re.I)
_PAGE = re.compile(r"\s*<([!?]|(html|head|body|title|meta|link|script|style)\b)", re.I)
_WIDE = (b"\x1b$", b"\0")  # of ISO 2022 and UTF-16, which are valid UTF-8
_GUARD = "\ufdd0"
"""A code point that no text has."""


def html_text(html: str, *, is_page: bool = False) -> tuple[str, str]:
    """Extract title and text of a piece of HTML, or title and main text of a page."""
    with needs_package("HTML", "resiliparse"):
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree

    html = html if _PAGE.match(html) else f"<body>{html}"  # a piece of a page
    # Resiliparse 2.0 drops most texts that consist of one character, and lists near the root.
    html = _LONE_CHARACTER.sub(rf">\1{_GUARD}", _BODY.sub(r"\g<0><div><div><div>", html, count=1))
    tree = HTMLTree.parse(html)
    text = extract_plain_text(tree, main_content=is_page, alt_texts=False, preserve_formatting=True)
    title = (tree.title or "").replace(_GUARD, "").strip()
    return title, without_surrogates(text.replace(_GUARD, ""))


def page_text(data: bytes) -> tuple[str, str]:
    """Extract title and main text of an HTML page: UTF-8 if it is valid, else in its declared or a
    detected encoding."""
    with needs_package("HTML", "resiliparse"):
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    is_utf8 = data.decode("utf-8", "ignore").encode() == data and not any(m in data for m in _WIDE)
    others = (detect_encoding(data, from_html_meta=meta) or "utf-8" for meta in (True, False))
    for encoding in chain(["utf-8"] * is_utf8, others):
        html = bytes_to_str(data, encoding, "replace", ())
        if is_utf8 or 2 * html.count("\ufffd") <= len(html) - len(html.encode("ascii", "ignore")):
            break
    else:
        html = bytes_to_str(data, encoding)
    return html_text(html, is_page=True)


def read_html(stream: FileStream) -> Iterator[Document]:
    """Yield the page as one document."""
    data = stream.read(MAX_RECORD_BYTES + 1)
    reason = f"skipped: a page of more than {MAX_RECORD_BYTES:,} bytes"
    if len(data) <= MAX_RECORD_BYTES:
        title, text = page_text(data)
        if text.strip():
            name = stream.file.name
            yield Document(id=name, text=text, title=title, source=name)
            return
        reason = "skipped: a page without text"
    stream.add_problem(reason, counter="n_skipped_files")


def read_warc(stream: FileStream) -> Iterator[Document]:
    """Yield a document for each page of an archive, with the page's URL as its id."""
    with needs_package("a WARC file", "fastwarc"):
        from fastwarc.warc import ArchiveIterator, WarcRecordType

    types = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    try:
        # Quirks: the lines of an HTTP head may end with a newline alone.
        archive = ArchiveIterator(stream, record_types=types, parse_http=True, quirks_mode=True)
        for number, record in enumerate(archive, start=1):
            offset = record.stream_pos
            content_type = record.http_content_type or record.headers.get("Content-Type") or ""
            is_html = content_type.lower().startswith(_HTML_TYPES)
            is_text = content_type.lower().startswith("text/plain")
            http = record.http_headers
            is_error = http is not None and not 200 <= (http.status_code or 0) < 300
            if is_error or not (is_html or is_text):
                stream.report.n_other_records += 1
                stream.omit("an error, an image or the like", record.content_length, unit="record")
                continue

            data = _decode_body(record.reader.read(MAX_RECORD_BYTES + 1), http or {})
            if len(data) > MAX_RECORD_BYTES:
                reason = f"more than {MAX_RECORD_BYTES:,} bytes"
                stream.skip_record(reason, number, offset, record.content_length)
                continue
            if is_html:
                title, text = page_text(data)
            else:
                charset = _known_charset(record.http_charset)
                title, text = "", data.decode(charset, "replace")
                if text != data.decode(charset, "ignore"):
                    reason = f"bytes that are not {charset} were replaced by U+FFFD"
                    stream.add_problem(reason, line=number, offset=offset, counter="n_repaired")
            if not text.strip():
                reason = "a page without text, or in an unknown content encoding"
                stream.skip_record(reason, number, offset, record.content_length)
                continue
            name = stream.file.name
            url = record.headers.get("WARC-Target-URI") or f"{name}:{number}"
            yield Document(url, with_newlines(text), title, name, offset or 0)
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
    with needs_package("a WARC file", "fastwarc"):
        import brotli
        import zstandard

    if "chunked" in (http.get("Transfer-Encoding") or "").lower():
        parts = []
        position = 0
        while size := _HTTP_CHUNK_SIZE.match(data, position):
            position = size.end() + int(size[1], 16)
            parts.append(data[size.end() : position])
        data = b"".join(parts) or data
    encoding = compression_of(data) or (http.get("Content-Encoding") or "").strip().lower()
    with suppress(zlib.error, brotli.error, zstandard.ZstdError):
        n_bytes = MAX_RECORD_BYTES + 1
        if encoding in ("gzip", "x-gzip", "deflate"):
            # What is called deflate has a head of zlib or none.
            has_head = encoding != "deflate" or data[:1] == b"\x78"
            return zlib.decompressobj(47 if has_head else -15).decompress(data, n_bytes)
        if encoding in ("zstd", "zstandard"):
            return zstandard.ZstdDecompressor().stream_reader(data).read(n_bytes)
        if encoding == "br":
            decoder = brotli.Decompressor()
            content: bytes = decoder.process(data, output_buffer_limit=n_bytes)
            if decoder.is_finished() or len(content) >= n_bytes:
                return content
    is_packed = encoding and len(_CONTROL.findall(data)) > 0.01 * len(data)
    return b"" if is_packed else data
