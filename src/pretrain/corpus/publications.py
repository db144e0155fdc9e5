"""PDF, EPUB, office documents, mail, wikis, notebooks -> documents.

Each reader yields title and text of what is in a stream. Sizes are bounded before a library reads.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from email import message_from_bytes, policy
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

from pretrain import needs_package
from pretrain.corpus.documents import Document, StrictError, with_newlines
from pretrain.corpus.files import DamagedStreamError, FileStream
from pretrain.corpus.pages import html_text, page_text

MAX_PART_BYTES = 1 << 26
"""Of a chapter, a message, a page."""
MAX_FILE_BYTES = 1 << 29
"""Of a PDF document, and of an archive when it is unpacked."""
Texts = Iterator[tuple[str, str]]


def read_publication(stream: FileStream, format: str, kind: str) -> Iterator[Document]:
    """Yield the documents of a file of one of the formats READERS; one that is damaged, locked or
    too large is skipped, or ends there. `kind` is what the user calls such a file."""
    name, number = stream.file.name, 0
    try:
        for number, (title, text) in enumerate(READERS[format](stream), start=1):
            if text.strip():
                id_ = name if number == 1 else f"{name}#{number}"
                yield Document(id_, with_newlines(text), title, name)
            else:
                stream.omit("without text: pictures only, or empty", 0, unit="document")
    except StrictError:
        raise
    except Exception as error:  # of a library, about a damaged file
        reason = error if type(error) is ValueError else f"it cannot be read: {error!r}"
        damage = DamagedStreamError(f"{kind}; {reason}"[:400])
        if number:
            stream.end(damage, stream.raw.tell())
        else:
            stream.skip_file(damage)


def _pdf(stream: FileStream) -> Texts:
    with needs_package("it", "pypdf", extra="documents"):
        from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # else it prints what it repairs
    with stream.unpacked() as path:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
        reader = PdfReader(path)
        title = reader.metadata.title if reader.metadata else None
        yield str(title or ""), "\n\n".join(page.extract_text() for page in reader.pages)


def _zip(stream: FileStream) -> Texts:
    """A book (EPUB 3.3) or a text of an office (ECMA-376, OpenDocument 1.3)."""
    with stream.unpacked() as path, zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes when it is unpacked")
        names = archive.namelist()
        if {"META-INF/rights.xml", "META-INF/sinf.xml"} & set(names):
            raise ValueError("its text is locked (DRM)")
        if "META-INF/container.xml" in names:
            yield _epub(archive)
        elif "word/document.xml" in names:
            parts = [name for name in _WORD_PARTS if name in names]
            texts = [_paragraphs(_xml(archive, part), is_word=True) for part in parts]
            yield "", "\n".join(filter(str.strip, texts))
        elif "content.xml" in names:
            yield "", _paragraphs(_xml(archive, "content.xml"), is_word=False)
        else:
            raise ValueError("unpack it (unzip FILE); save sheets as CSV, slides as PDF")


def _part(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as file:
        data = file.read(MAX_PART_BYTES + 1)
    if len(data) > MAX_PART_BYTES or b"<!ENTITY" in data:
        raise ValueError(f"{name} is too large, or declares entities")
    return data


def _xml(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    return ElementTree.fromstring(_part(archive, name))


def _epub(archive: zipfile.ZipFile) -> tuple[str, str]:
    """Title and text of a book: its chapters in the order of its spine."""
    (file, *_) = _xml(archive, "META-INF/container.xml").iterfind(".//{*}rootfile")
    path = file.attrib["full-path"]
    package = _xml(archive, path)
    hrefs = {item.get("id"): item.attrib["href"] for item in package.iterfind(".//{*}item")}
    # Each once: a small file could name a large chapter again and again.
    chapters = dict.fromkeys(hrefs[item.get("idref")] for item in package.iterfind(".//{*}itemref"))
    paths = (posixpath.join(posixpath.dirname(path), unquote(href)) for href in chapters)
    text = "\n\n".join(page_text(_part(archive, path))[1] for path in paths)
    return package.findtext(".//{*}title") or "", text


_WORD_PARTS = ("word/document.xml", "word/footnotes.xml", "word/endnotes.xml")
# Deleted, moved away, a copy for old programs, comments; settings of a paragraph.
_NO_TEXT = {"tracked-changes", "moveFrom", "Fallback", "annotation", "pPr"}
_SIGNS = {"tab": "\t", "br": "\n", "cr": "\n", "line-break": "\n"}
_COUNT = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}c"


def _paragraphs(root: ElementTree.Element, *, is_word: bool) -> str:
    """The lines of Word or OpenDocument; a note or a text box follows its paragraph."""
    paragraphs: list[list[str]] = []

    def walk(element: ElementTree.Element, words: list[str]) -> None:
        name = element.tag.rpartition("}")[2]
        if name in ("p", "h"):
            paragraphs.append(words := [])
        text = "" if is_word and name != "t" else element.text or ""
        if name == "s":
            text = " " * min(int(element.get(_COUNT, 1)), 99)
        words.append(_SIGNS.get(name, text))
        for child in element:
            if child.tag.rpartition("}")[2] not in _NO_TEXT:
                walk(child, words)
            words.append("" if is_word else child.tail or "")

    walk(root, [])
    return "\n".join(map("".join, paragraphs))


def _mail(stream: FileStream) -> Texts:
    """The messages of a mailbox, or the only one of a file, each with its subject."""
    for data in _messages(stream):
        title = text = ""
        with suppress(Exception):  # a damaged part: without text
            message: Any = message_from_bytes(data, policy=policy.default)
            title = str(message["subject"] or "")
            body = message.get_body(("plain", "html"))
            text = body.get_payload(decode=True).decode("utf-8", "replace")
            with suppress(LookupError):  # an unknown charset
                text = body.get_content()
            if body.get_content_subtype() == "html":
                # A page whose charset the mail does not name, names it itself.
                page = None if body.get_content_charset() else body.get_payload(decode=True)
                text = (page_text(page) if page else html_text(text, is_page=True))[1]
        yield title, text


def _messages(stream: FileStream) -> Iterator[bytes]:
    """A message of a mailbox begins with a line `From ...` after an empty line (RFC 4155)."""
    message = bytearray()
    is_box = stream.peek().startswith(b"From ")
    while line := stream.readline(MAX_PART_BYTES):
        if is_box and line.startswith(b"From ") and message.endswith((b"\n\n", b"\n\r\n")):
            yield bytes(message)
            message.clear()
        if len(message) < MAX_PART_BYTES:
            message += line
    yield bytes(message)


def _elements(stream: FileStream, tag: str) -> Iterator[ElementTree.Element]:
    """The elements of one tag, one at a time, none of them larger than MAX_PART_BYTES."""
    parser: Any = ElementTree.XMLPullParser(("start", "end"))
    root: Any = None
    n_bytes = 0
    while chunk := stream.read(1 << 16):
        n_bytes += len(chunk)
        if n_bytes > MAX_PART_BYTES or b"<!ENTITY" in chunk:
            raise ValueError("a part is too large, or it declares entities")
        parser.feed(chunk)
        for event, element in parser.read_events():
            root = element if root is None else root
            if event == "end" and element.tag.rpartition("}")[2] == tag:
                yield element
                root.clear()
                n_bytes = 0


def _mediawiki(stream: FileStream) -> Texts:
    """The articles of a dump, without redirects and pages about pages."""
    with needs_package("it", "mwparserfromhell", extra="documents"):
        from mwparserfromhell import parse

    for page in _elements(stream, "page"):
        text = page.findtext(".//{*}text") or ""
        if page.findtext("{*}ns") in ("0", None) and page.find("{*}redirect") is None:
            yield page.findtext("{*}title") or "", str(parse(text).strip_code())
        else:
            stream.omit("a redirect, or no article", len(text.encode()), unit="page")


def _stack_exchange(stream: FileStream) -> Texts:
    for row in _elements(stream, "row"):
        body = row.get("Body")
        yield row.get("Title", ""), html_text(body)[1] if body else row.get("Text", "")


def _notebook(stream: FileStream) -> Texts:
    """Prose and code, without outputs."""
    data = stream.read(MAX_PART_BYTES)
    text = "\n\n".join("".join(cell["source"]) for cell in json.loads(data)["cells"])
    stream.omit("outputs and settings", len(data) - len(text.encode()), unit="notebook")
    yield "", text


READERS: dict[str, Callable[[FileStream], Texts]] = {
    "pdf": _pdf,
    "zip": _zip,
    "mail": _mail,
    "mediawiki": _mediawiki,
    "stackexchange": _stack_exchange,
    "notebook": _notebook,
}
