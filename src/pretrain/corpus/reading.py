"""Files -> documents: each file by the reader of its format.

Files of a source come in, `Document`s go out in a fixed order, one at a time, so that memory does
not grow with the corpus. What cannot be read is skipped and written into the report with its place;
in strict mode, and for a file given by name that is no text, it is a ValueError.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pretrain.corpus.documents import Document, Problem, ReadingReport, SourceCounts
from pretrain.corpus.files import LEGAL, Source, SourceFile, format_of, list_files
from pretrain.corpus.records import Row, read_records, without_surrogates
from pretrain.corpus.rows import csv_rows, json_rows, jsonl_rows, parquet_rows
from pretrain.corpus.streams import DamagedStreamError, read_chunks, read_head
from pretrain.corpus.web import read_html, read_warc

PART_BYTES = 1 << 24
"""A longer text is read in parts of about this size, each a document, so that memory stays
bounded."""
_MAX_BAD_FRACTION = 0.01


def read_documents(
    source: Source,
    *,
    text_field: str | None = None,
    report: ReadingReport | None = None,
    strict: bool = False,
) -> Iterator[Document]:
    """The documents of a source, or of several, in the order of sources, relative paths and lines.

    `text_field` names the field of jsonl records that holds the text; None finds it in each file's
    first records. `report` is filled while the documents are drawn. With `strict` the first problem
    is a ValueError.
    """
    report = report if report is not None else ReadingReport()
    files = list_files(source, report=report, strict=strict)
    return read_files(files, text_field=text_field, report=report, strict=strict)


def read_files(
    files: Iterable[SourceFile], *, text_field: str | None, report: ReadingReport, strict: bool
) -> Iterator[Document]:
    """The documents of files that `list_files` found, in their order."""
    for file in files:
        report.n_files += 1
        counts = report.sources.setdefault(file.source_argument, SourceCounts())
        counts.n_files += 1
        before = report.n_documents + report.n_problems
        try:
            documents = _documents(file, text_field=text_field, report=report, strict=strict)
        except OSError as error:
            _pass_over(file, Problem(file.name, f"cannot be read: {error.strerror}"), report)
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
        if report.n_documents + report.n_problems == before:
            report.add(Problem(file.name, "holds no document"), strict=strict)


def _documents(
    file: SourceFile, *, text_field: str | None, report: ReadingReport, strict: bool
) -> Iterator[Document]:
    rows: Iterator[Row]
    head = read_head(file)
    match format_of(head, file.path.name):
        case "html":
            return read_html(file, report=report, strict=strict)
        case "warc":
            return read_warc(file, report=report, strict=strict)
        case "text":
            return _read_text(file, report=report, strict=strict)
        case None:
            reason = "binary, not text: a NUL byte"
            _pass_over(file, Problem(file.name, reason, offset=head.index(0)), report)
            return iter(())
        case "jsonl":
            rows = jsonl_rows(file, report=report, strict=strict)
        case "json":
            rows = json_rows(file, text_field=text_field, report=report, strict=strict)
        case "csv":
            rows = csv_rows(file, report=report, strict=strict)
        case "parquet":
            rows = parquet_rows(file, text_field=text_field, report=report, strict=strict)
    return read_records(rows, file, text_field=text_field, report=report, strict=strict)


def _read_text(file: SourceFile, *, report: ReadingReport, strict: bool) -> Iterator[Document]:
    data, offset, number = bytearray(), 0, 1
    try:
        for chunk in read_chunks(file, report=report):
            data += chunk
            while len(data) > PART_BYTES:
                stop = _place_to_cut(data)
                part = bytes(data[:stop])
                del data[:stop]
                yield from _part(file, part, offset, number, report, strict)
                offset, number = offset + stop, number + 1
    except DamagedStreamError as damage:
        report.n_partial_files += 1
        stop = offset + len(data)
        note = f"{damage}; kept the {stop:,} bytes before that"
        report.add(Problem(file.name, note, offset=stop), strict=strict)
    if data or number == 1:
        yield from _part(file, bytes(data), offset, number, report, strict)


def _place_to_cut(data: bytearray) -> int:
    """Where a part ends: behind the last empty line, line or word in its second half, else between
    two characters."""
    for mark in (b"\n\n", b"\n", b" "):
        place = data.rfind(mark, PART_BYTES // 2, PART_BYTES)
        if place >= 0:
            return place + len(mark)
    stop = PART_BYTES
    while stop > PART_BYTES - 3 and data[stop] & 0xC0 == 0x80:
        stop -= 1
    return stop


def _part(
    file: SourceFile, data: bytes, offset: int, number: int, report: ReadingReport, strict: bool
) -> Iterator[Document]:
    """A text, or a part of a long one, as a document."""
    decoded = _decode(data, file.name, offset)
    if isinstance(decoded, Problem):
        _pass_over(file, decoded, report, is_start=number == 1)
        return
    text, repair = decoded
    if repair is not None:
        report.add(repair, strict=strict)
        report.n_repaired += 1
    text = text.replace("\r\n", "\n")
    if text.strip():
        name = file.name if number == 1 else f"{file.name}#{number}"
        yield Document(id=name, text=text, source=file.name, offset=offset)
    elif number == 1:
        report.n_skipped_files += 1
        report.add(Problem(file.name, "skipped: empty text", offset=0), strict=strict)


def _pass_over(
    file: SourceFile, problem: Problem, report: ReadingReport, *, is_start: bool = True
) -> None:
    """Leave out what is no text; ValueError if it is the beginning of a file given by name."""
    if file.is_named and is_start:
        raise ValueError(f"{problem}; {LEGAL}")
    report.n_skipped_files += 1
    # A stray picture beside the texts is no fault of the texts, so strict lets it pass.
    report.add(problem, strict=False)


def _decode(data: bytes, name: str, offset: int) -> tuple[str, Problem | None] | Problem:
    """The text and what was repaired in it, or, of something that is no text, the problem. `offset`
    is where it begins in its file."""
    has_mark = offset == 0 and data.startswith(codecs.BOM_UTF8)
    start = len(codecs.BOM_UTF8) if has_mark else 0
    try:
        return data[start:].decode("utf-8"), None
    except UnicodeDecodeError as error:
        first = offset + start + error.start

    text = data[start:].decode("utf-8", "replace")
    n_bad = text.count("\ufffd") - data.count("\ufffd".encode())
    if n_bad > _MAX_BAD_FRACTION * len(data):
        reason = (
            f"not UTF-8 text: {n_bad:,} invalid sequences in {len(data):,} bytes, the first "
            "here; if it is text "
            "in another encoding, convert it first (iconv -f latin1 -t utf-8 FILE)"
        )
        return Problem(name, reason, offset=first)
    reason = f"{n_bad:,} invalid UTF-8 sequences, the first here, were replaced by U+FFFD"
    return text, Problem(name, reason, offset=first)
