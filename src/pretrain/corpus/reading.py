"""Files -> documents: each file by the reader of its format.

Files of a source come in, `Document`s go out in a fixed order, one at a time, so that memory does
not grow with the corpus. What cannot be read is skipped and reported with its place; with a strict
report, and for a binary file that the user named, it is a ValueError.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from pretrain.corpus.documents import Document, Omission, ReadingReport, with_newlines
from pretrain.corpus.files import HEAD_BYTES, FileStream, Source, SourceFile, format_of, list_files
from pretrain.corpus.pages import read_html, read_warc
from pretrain.corpus.publications import read_publication
from pretrain.corpus.records import Row, json_rows, jsonl_rows, read_records
from pretrain.corpus.tables import arrow_rows, csv_rows
from pretrain.fileio import without_surrogates

MAX_DOCUMENT_BYTES = 1 << 24
"""A longer text file is split into documents of about this size, so that memory stays bounded."""
_MARK = re.compile(r"<\|\w{1,40}\|>")
_SEPARATOR = "--data.document_separator"
_MAX_INVALID_FRACTION = 0.01
# The head of WebVTT; the number and the times of a subtitle; italics, speakers, times of words.
_CUE = re.compile(
    r"\AWEBVTT.*\n((?!.*-->).+\n)*|^(\d+\n)?[\d:.,]+ --> .*\n"
    r"|<(/?([biuvc]|font|lang|ruby|rt)\b[^<>\n]{0,99}|[\d:.]+)>",
    re.M,
)
# The notices around a book of Project Gutenberg (gutenberg.org/help/file_formats.html), 20,000
# characters each; before 2003 the first ended with the small print.
_START = (
    r"(?:^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG[^*]{0,300}\*\*\*.*$"
    r"|^\*END[* ]+THE SMALL PRINT!.*$)"
)
_END = (
    r"\n[ \t]{0,99}(?:\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG"
    r"|End of (?:[Tt]h[ei]s? )?Project Gutenberg(?:['\u2019]s| E-?(?:[Bb]ook|[Tt]ext)| e[Bb]ook))"
)
_FIRST_LINES = re.compile(
    r"\s*\*\*\* ?START|[\s\S]{0,500}?(?<!(?:ART|END) OF THE )(?<!(?:ART|END) OF THIS )"
    r"project gutenberg(?:['\u2019]s| e-?(?:book|text))",
    re.I,
)
_ENDS = re.compile(_END)
# Two patterns, of which the second begins with one character: Python searches 16 times as fast.
_FIRST_NOTICE = re.compile(rf"[\s\S]{{0,65536}}?{_START}", re.M)
# Up to the next book, or the end. There the licence follows, or nothing: else the end is quoted.
_LAST = (
    r"(?=[\s\S]{0,200}\Z|[\s\S]{0,2000}?(?:Updated editions|This file should be named|Section 1\.))"
)
_LATER_NOTICE = re.compile(
    rf"{_END}(?:[\s\S]{{0,65536}}?{_START}|{_LAST}[\s\S]{{0,65536}}\Z)", re.M
)
RECORD_FORMATS: dict[str, Callable[[FileStream, str | None], Iterator[Row]]] = {
    "jsonl": jsonl_rows,
    "json": json_rows,
    "csv": csv_rows,
    "parquet": arrow_rows,
    "arrow": arrow_rows,
}


def read_documents(
    source: Source, *, text_field: str | None = None, report: ReadingReport | None = None
) -> Iterator[Document]:
    """Yield the documents of one or several sources, in the order of sources, paths and lines.

    `text_field` names the field of records that contains the text, or several, as "title,post.body"
    or "html:body" (`records`); None detects it in the first records of each file. `report` is
    filled while documents are drawn.
    """
    report = report if report is not None else ReadingReport()
    return read_files(list_files(source, report=report), text_field=text_field, report=report)


def read_files(
    files: Iterable[SourceFile], *, text_field: str | None, report: ReadingReport
) -> Iterator[Document]:
    """Yield the documents of the files from `list_files`, in their order."""
    report.text_field = text_field
    for file in files:
        report.n_files += 1
        n_before, n_problems_before = report.n_documents, report.n_problems
        n_bytes_before = report.n_read_bytes
        with FileStream(file, report) as stream:
            for document in _read_stream(stream, text_field):
                text = _without_notices(document.text)
                n_bytes = len(text if text.isascii() else text.encode())
                if text is not document.text:
                    n_omitted = len(document.text.encode()) - n_bytes
                    stream.omit("notices of Project Gutenberg", n_omitted, unit="book")
                for mark, n in Counter(_MARK.findall(text) if "<|" in text else ()).items():
                    reason = f"{mark} as letters; if it divides documents: {_SEPARATOR} '{mark}'"
                    report.omit(mark, Omission(reason, "mark", n, 0, [file.name], is_read=True))
                report.n_documents += 1
                report.n_text_bytes += n_bytes
                yield replace(
                    document,
                    text=text,
                    id=without_surrogates(document.id),
                    title=without_surrogates(document.title),
                )
            if report.n_documents + report.n_problems == n_before + n_problems_before:
                stream.add_problem("contains no document")
            stream.share_omitted(has_document=report.n_documents > n_before)
        report.n_read_bytes = n_bytes_before + file.n_bytes


def _read_stream(stream: FileStream, text_field: str | None) -> Iterator[Document]:
    try:
        head = stream.peek()[:HEAD_BYTES]
    except OSError as error:
        stream.skip_file(f"cannot be read: {error.strerror}")
        return
    if stream.damage and not head:
        return
    format, note = format_of(head, stream.file.path.name)
    match format:
        case None:
            stream.skip_file(note, offset=head.index(0) if note.startswith("binary") else None)
        case "html":
            yield from read_html(stream)
        case "warc":
            yield from read_warc(stream)
        case "text":
            if note:
                file = stream.file
                as_it_is = Omission(note, "file", 1, file.n_bytes, [file.name], is_read=True)
                stream.report.omit(note, as_it_is)
            yield from _read_text(stream)
        case "subtitles":
            for document in _read_text(stream):
                yield replace(document, text=_CUE.sub("", document.text))
        case _ if reader := RECORD_FORMATS.get(format):
            yield from read_records(reader(stream, text_field), stream, text_field)
        case _:
            yield from read_publication(stream, format, note)


def _read_text(stream: FileStream) -> Iterator[Document]:
    """Yield a text file as one document, or a long one as documents `NAME`, `NAME#2`, ...

    A text that is empty or not UTF-8 is skipped.
    """
    name = stream.file.name
    for number, (offset, data) in enumerate(_divide_text(stream), start=1):
        bom = codecs.BOM_UTF8 if number == 1 and data.startswith(codecs.BOM_UTF8) else b""
        encoded = data[len(bom) :]
        try:
            text = encoded.decode("utf-8")
        except UnicodeDecodeError as error:
            place = offset + len(bom) + error.start
            text = encoded.decode("utf-8", "replace")
            n_invalid = text.count("\ufffd") - data.count("\ufffd".encode())
            if n_invalid > _MAX_INVALID_FRACTION * len(data):
                reason = (
                    f"not UTF-8 text: {n_invalid:,} invalid sequences in {len(data):,} bytes, the "
                    "first here; if it is text in another encoding, convert it first (iconv -f "
                    "latin1 -t utf-8 FILE)"
                )
                if number == 1:
                    stream.skip_file(reason, offset=place)
                else:
                    stream.add_problem(reason, offset=place, n_bytes=len(data))
                continue
            reason = f"{n_invalid:,} invalid UTF-8 sequences, the first here, are now U+FFFD"
            stream.add_problem(reason, offset=place, counter="n_repaired")

        text = with_newlines(text)
        if text.strip():
            id_ = name if number == 1 else f"{name}#{number}"
            yield Document(id=id_, text=text, source=name, offset=offset)
        elif number == 1:
            stream.add_problem("skipped: empty text", offset=0, counter="n_skipped_files")


def _without_notices(text: str) -> str:
    """The books of Project Gutenberg in a text; another text as it is."""
    if "PROJECT GUTENBERG" not in text and "Project Gutenberg" not in text:
        return text
    first = _FIRST_NOTICE.match(text)
    # A text that quotes a notice stays whole. So many ends belong to other texts, and take long.
    is_quoted = first and not _FIRST_LINES.match(text)
    if is_quoted or len(_ENDS.findall(text)) > 500:
        return text
    books = _LATER_NOTICE.sub("\n", text[first.end() :] if first else text)
    return books.strip() + "\n" if books.strip() and len(books) < len(text) else text


def _divide_text(stream: FileStream) -> Iterator[tuple[int, bytes]]:
    """Yield the documents of a text with the first byte of each: its parts, or, with a separator,
    what is between separators and the empty lines around them."""
    separator = (stream.report.document_separator or "").replace("\r\n", "\n").encode()
    if b"\r\n" in stream.peek():
        separator = separator.replace(b"\n", b"\r\n")
    for offset, data in _split_text(stream, separator):
        if not separator:
            yield offset, data
            continue
        for document in data.split(separator):
            start = len(document) - len(document.lstrip(b"\r\n"))
            if document.strip():
                yield offset + start, document.strip(b"\r\n")
            offset += len(document) + len(separator)


def _split_text(stream: FileStream, last: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield a text in parts of at most MAX_DOCUMENT_BYTES, each with its first byte.

    A part ends after its `last` separator, or its last empty line, line or word in its second half,
    else between two characters.
    """
    offset = 0
    data = stream.read(HEAD_BYTES)  # without memory for a long text
    data += stream.read(MAX_DOCUMENT_BYTES + 1 - len(data)) if len(data) == HEAD_BYTES else b""
    while len(data) > MAX_DOCUMENT_BYTES:
        stop = MAX_DOCUMENT_BYTES
        for separator in (*filter(None, [last]), b"\n\n", b"\n", b" "):
            start = 0 if separator == last else MAX_DOCUMENT_BYTES // 2
            position = data.rfind(separator, start, MAX_DOCUMENT_BYTES)
            if position >= 0:
                stop = position + len(separator)
                break
        else:
            while stop > MAX_DOCUMENT_BYTES - 3 and data[stop] & 0xC0 == 0x80:
                stop -= 1
        yield offset, data[:stop]
        offset += stop
        data = data[stop:] + stream.read(stop)
    if data or not offset:
        yield offset, data
