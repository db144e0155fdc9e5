"""Files -> documents: each file by the reader of its format.

Files of a source come in, `Document`s go out in a fixed order, one at a time, so that memory does
not grow with the corpus. What cannot be read is skipped and reported with its place; in strict
mode, and for a binary file that the user named, it is a ValueError.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pretrain.corpus.documents import Document, Problem, ReadingReport, SourceCounts
from pretrain.corpus.files import SUPPORTED_FORMATS, Source, SourceFile, format_of, list_files
from pretrain.corpus.records import Row, read_records, without_surrogates
from pretrain.corpus.rows import csv_rows, json_rows, jsonl_rows, parquet_rows
from pretrain.corpus.streams import DamagedStreamError, read_chunks, read_head
from pretrain.corpus.web import read_html, read_warc

MAX_DOCUMENT_BYTES = 1 << 24
"""A longer text file is split into documents of about this size, so that memory stays bounded."""
_MAX_INVALID_FRACTION = 0.01


def read_documents(
    source: Source,
    *,
    text_field: str | None = None,
    report: ReadingReport | None = None,
    strict: bool = False,
) -> Iterator[Document]:
    """Yield the documents of one or several sources, in the order of sources, paths and lines.

    `text_field` names the field of records that contains the text; None detects it in the first
    records of each file. `report` is filled while documents are drawn. With `strict` the first
    problem is a ValueError.
    """
    report = report if report is not None else ReadingReport()
    files = list_files(source, report=report, strict=strict)
    return read_files(files, text_field=text_field, report=report, strict=strict)


def read_files(
    files: Iterable[SourceFile], *, text_field: str | None, report: ReadingReport, strict: bool
) -> Iterator[Document]:
    """Yield the documents of the files from `list_files`, in their order."""
    report.strict = strict
    for file in files:
        report.n_files += 1
        counts = report.sources.setdefault(file.source_argument, SourceCounts())
        counts.n_files += 1
        n_before = report.n_documents + report.n_problems
        try:
            documents = _read_file(file, text_field, report)
        except OSError as error:
            _skip_file(file, Problem(file.name, f"cannot be read: {error.strerror}"), report)
            continue
        for document in documents:
            n_bytes = len(document.text.encode())
            report.n_documents += 1
            report.n_text_bytes += n_bytes
            counts.n_documents += 1
            counts.n_text_bytes += n_bytes
            yield replace(
                document,
                id=without_surrogates(document.id),
                title=without_surrogates(document.title),
                source_argument=file.source_argument,
            )
        if report.n_documents + report.n_problems == n_before:
            report.add(Problem(file.name, "contains no document"))


def _read_file(
    file: SourceFile, text_field: str | None, report: ReadingReport
) -> Iterator[Document]:
    rows: Iterator[Row]
    head = read_head(file)
    match format_of(head, file.path.name):
        case "html":
            return read_html(file, report)
        case "warc":
            return read_warc(file, report)
        case "text":
            return _read_text(file, report)
        case None:
            reason = "binary, not text: a NUL byte"
            _skip_file(file, Problem(file.name, reason, offset=head.index(0)), report)
            return iter(())
        case "jsonl":
            rows = jsonl_rows(file, report)
        case "json":
            rows = json_rows(file, text_field, report)
        case "csv":
            rows = csv_rows(file, report)
        case "parquet":
            rows = parquet_rows(file, text_field, report)
    return read_records(rows, file, text_field, report)


def _read_text(file: SourceFile, report: ReadingReport) -> Iterator[Document]:
    """Yield a text file as one document, or a long one as documents `NAME`, `NAME#2`, ..."""
    data = bytearray()
    offset = 0
    number = 1
    try:
        for chunk in read_chunks(file, report):
            data += chunk
            while len(data) > MAX_DOCUMENT_BYTES:
                stop = _split_position(data)
                part = bytes(data[:stop])
                del data[:stop]
                yield from _text_document(file, part, offset, number, report)
                offset += stop
                number += 1
    except DamagedStreamError as damage:
        report.n_partial_files += 1
        stop = offset + len(data)
        reason = f"{damage}; kept the {stop:,} bytes before that"
        report.add(Problem(file.name, reason, offset=stop))
    if data or number == 1:
        yield from _text_document(file, bytes(data), offset, number, report)


def _split_position(data: bytearray) -> int:
    """Where to split a long text: after the last empty line, line or word in the second half of
    MAX_DOCUMENT_BYTES, else between two characters."""
    for separator in (b"\n\n", b"\n", b" "):
        position = data.rfind(separator, MAX_DOCUMENT_BYTES // 2, MAX_DOCUMENT_BYTES)
        if position >= 0:
            return position + len(separator)
    stop = MAX_DOCUMENT_BYTES
    while stop > MAX_DOCUMENT_BYTES - 3 and data[stop] & 0xC0 == 0x80:
        stop -= 1
    return stop


def _text_document(
    file: SourceFile, data: bytes, offset: int, number: int, report: ReadingReport
) -> Iterator[Document]:
    """Yield a text, or the part `number` of a long one, unless it is empty or not UTF-8."""
    bom = codecs.BOM_UTF8 if offset == 0 and data.startswith(codecs.BOM_UTF8) else b""
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
                "first here; if it is text in another encoding, convert it first (iconv -f latin1 "
                "-t utf-8 FILE)"
            )
            _skip_file(file, Problem(file.name, reason, offset=place), report, is_start=number == 1)
            return
        reason = f"{n_invalid:,} invalid UTF-8 sequences, the first here, were replaced by U+FFFD"
        report.add(Problem(file.name, reason, offset=place))
        report.n_repaired += 1

    text = text.replace("\r\n", "\n")
    if text.strip():
        id_ = file.name if number == 1 else f"{file.name}#{number}"
        yield Document(id=id_, text=text, source=file.name, offset=offset)
    elif number == 1:
        report.n_skipped_files += 1
        report.add(Problem(file.name, "skipped: empty text", offset=0))


def _skip_file(
    file: SourceFile, problem: Problem, report: ReadingReport, *, is_start: bool = True
) -> None:
    """Report a file that is not text; ValueError if the user named it and this is its start."""
    if file.is_named and is_start:
        raise ValueError(f"{problem}; {SUPPORTED_FORMATS}")
    report.n_skipped_files += 1
    # A picture between the texts is not an error of the texts, so strict mode allows it.
    report.add(problem, is_allowed=True)
