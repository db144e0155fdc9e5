"""HTML pages and WARC archives: main text, encodings and damaged archives."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus_files import (
    PACKING,
    PAGE,
    as_warc,
    read_texts,
)
from pretrain.corpus.documents import ReadingReport
from pretrain.corpus.reading import read_documents


@pytest.mark.parametrize(("suffix", "compress"), PACKING)
def test_main_text_of_pages(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    pytest.importorskip("resiliparse")
    (tmp_path / f"page.html{suffix}").write_bytes(compress(PAGE.encode()))
    (tmp_path / f"pages.warc{suffix}").write_bytes(compress(as_warc()))
    report = ReadingReport(strict=True)
    page, answer, plain = read_documents(tmp_path, report=report)
    assert page.title == "A page"
    assert page.text.startswith("Whales\n")
    assert "whale much is told, änd" in page.text
    assert "Home" not in page.text
    assert (answer.id, answer.text, answer.title) == ("http://a/", page.text, "A page")
    assert (plain.id, plain.text) == ("http://b/", "Plain tëxt.")
    assert as_warc()[answer.offset :].startswith(b"WARC/1.0\r\nWARC-Type: response")
    assert (report.n_other_records, report.n_problems) == (1, 0)


@pytest.mark.parametrize("cut", [20, 300, -40])
def test_truncated_archive_keeps_its_complete_records(tmp_path: Path, cut: int) -> None:
    pytest.importorskip("fastwarc")
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(as_warc())[:cut])
    report = ReadingReport()
    found = read_texts(tmp_path, report=report)
    assert report.n_partial_files == 1
    assert all(text.startswith(("Whales", "Plain")) for text in found)
    with pytest.raises(ValueError, match=r"^a\.warc\.gz, byte \d+: the gzip file is truncated;"):
        read_texts(tmp_path, report=ReadingReport(strict=True))


def test_responses_are_decoded_or_skipped(tmp_path: Path) -> None:
    pytest.importorskip("fastwarc")
    page, noise = PAGE.encode(), random.Random(0).randbytes(500)
    packed = gzip.compress(page)
    chunked = b"%x\r\n%b\r\n%x;a=b\r\n%b\r\n0\r\n\r\n" % (99, page[:99], len(page) - 99, page[99:])
    answers = {
        "plain": (b"200 OK", b"Content-Type: text/html", page),
        "gzip": (b"200 OK", b"Content-Type: text/html\r\nContent-Encoding: gzip", packed),
        "chunks": (b"203 OK", b"Content-Type: text/html\r\nTransfer-Encoding: Chunked", chunked),
        "no-gzip": (b"200 OK", b"Content-Type: text/html\r\nContent-Encoding: gzip", page),
        "no-chunks": (b"200 OK", b"Content-Type: text/html\r\nTransfer-Encoding: chunked", page),
        "latin": (b"200 OK", b"Content-Type: text/plain; charset=latin1", b"gr\xf6\xdfer\r\nals"),
        "broken": (b"200 OK", b"Content-Type: text/plain", b"gr\xf6\xdfer"),
        "cut": (b"200 OK", b"Content-Type: text/html", packed[:11] + noise),
        "br": (b"200 OK", b"Content-Type: text/html\r\nContent-Encoding: br", noise + b"\0"),
        "odd-charset": (b"200 OK", b"Content-Type: text/plain; charset=nosuch", b"great"),
        "gone": (b"404 Not Found", b"Content-Type: text/html", page),
        "odd": (b"OK", b"Content-Type: text/html", page),
    }
    archive = b""
    for name, (status, head, body) in answers.items():
        block = b"HTTP/1.1 %b\r\n%b\r\n\r\n%b" % (status, head, body)
        about = (
            f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {name}\r\nContent-Type: "
            f"application/http; msgtype=response\r\nContent-Length: {len(block)}\r\n\r\n"
        )
        archive += about.encode() + block + b"\r\n\r\n"
    (tmp_path / "a.warc").write_bytes(archive)
    report = ReadingReport()
    found = {d.id: d.text for d in read_documents(tmp_path / "a.warc", report=report)}
    pages = ("plain", "gzip", "chunks", "no-gzip", "no-chunks")
    (text,) = {found.pop(name) for name in pages}
    assert "whale much is told, änd" in text
    others = {"latin": "größer\nals", "broken": "gr\ufffd\ufffder", "odd-charset": "great"}
    assert found == others
    assert [problem.line for problem in report.problems] == [7, 8, 9]
    assert (report.n_repaired, report.n_skipped_records, report.n_other_records) == (1, 2, 2)
