"""HTML pages and WARC archives: main text, encodings and damaged archives."""

from __future__ import annotations

import gzip
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus_files import (
    PACKING,
    PAGE,
    as_warc,
    read_texts,
    zstd_compress,
)
from pretrain.corpus import pages
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


def test_a_title_of_one_character_and_pages_that_would_take_long() -> None:
    pytest.importorskip("resiliparse")
    for title in ("\u6211", "\u3000\u6211"):
        page = f"<html><head><title>{title}</title></head><body><p>\u6211</p></body></html>"
        assert pages.html_text(page) == ("\u6211", "\u6211")
    for piece, end in (("\u3000", "x"), ("\xa0", "x"), ("<body ", "")):
        start = time.process_time()
        text = ">" + piece * 20_000 + end  # was quadratic
        pages._LONE_CHARACTER.sub("", pages._BODY.sub("", text))
        assert time.process_time() - start < 1


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


def response(address: str, head: bytes, body: bytes, end: bytes = b"\r\n") -> bytes:
    """A record of a WARC file; `end` ends the lines of the HTTP head."""
    http = end.join([b"HTTP/1.1 200 OK", b"Content-Type: text/html", *head.split(), b"", body])
    warc = (
        f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Target-URI: {address}\r\nContent-Type: "
        f"application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
    )
    return warc.encode() + http + b"\r\n\r\n"


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("n_words", [1, 3, 30, 3000])
@pytest.mark.parametrize("name", ["deflate", "raw", "br", "zstd", "gzip", "plain"])
def test_bodies_of_all_encodings_are_decoded(tmp_path: Path, name: str, n_words: int) -> None:
    """RFC 9110, section 8.4.1: a body called deflate should have the head of zlib; some have none.
    Small ones often have no NUL byte. Many archives keep the header of a body that they decoded."""
    brotli = pytest.importorskip("brotli")
    pytest.importorskip("fastwarc")
    encoders: dict[str, Callable[[bytes], bytes]] = {
        "deflate": zlib.compress,
        "raw": raw_deflate,
        "br": brotli.compress,
        "zstd": zstd_compress,
        "gzip": gzip.compress,
        "plain": bytes,
    }
    draw = random.Random(n_words)
    texts = [" ".join(f"ship{draw.random()}" for _ in range(n_words)) for _ in range(40)]
    archive = b""
    for number, text in enumerate(texts):
        page = encoders[name](f"<html><body><p>{text}</p></body></html>".encode())
        said = {"raw": "deflate", "plain": draw.choice(["br", "deflate", "zstd"])}.get(name, name)
        archive += response(f"http://{number}", f"Content-Encoding:{said}".encode(), page)
    (tmp_path / "a.warc").write_bytes(archive)
    assert read_texts(tmp_path / "a.warc", report=ReadingReport(strict=True)) == texts


@pytest.mark.parametrize("said", [b"br", b"deflate", b"compress", b"gzip"])
def test_bodies_that_cannot_be_decoded_are_reported(tmp_path: Path, said: bytes) -> None:
    pytest.importorskip("fastwarc")
    draw = random.Random(1)
    noise = [bytes(draw.randrange(1, 256) for _ in range(60)) for _ in range(40)]
    head = b"Content-Encoding:" + said
    records = (response(f"http://{n}", head, body) for n, body in enumerate(noise))
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    report = ReadingReport()
    assert len(read_texts(tmp_path / "a.warc", report=report)) <= 1
    assert report.n_skipped_records >= 39


def test_http_heads_may_end_their_lines_with_newlines_alone(tmp_path: Path) -> None:
    pytest.importorskip("fastwarc")
    page = PAGE.encode()
    ends = {"a": b"\n", "b": b"\r\n"}
    archive = b"".join(response(name, b"Server:x", page, end) for name, end in ends.items())
    (tmp_path / "a.warc").write_bytes(archive)
    report = ReadingReport(strict=True)
    assert [d.id for d in read_documents(tmp_path / "a.warc", report=report)] == ["a", "b"]
    assert report.n_other_records == 0


PROSE = "<p>Lighthouses were built on cliffs, so that sailors could see their light from afar.</p>"


@pytest.mark.parametrize(
    ("html", "text"),
    [
        (
            "<p>彼は<ruby>海<rp>(</rp><rt>うみ</rt><rp>)</rp></ruby>を見た。</p>",
            "彼は海(うみ)を見た。",
        ),
        ("<p>It was <b>7°</b> or <b>7&deg;</b> in <i> 한 </i>.</p>", "It was 7° or 7° in 한 ."),
        ("<table><tr><td>x²<td>où<td>\nก\n</table>", "x²\t\toù\t\tก"),
        (
            "<ul><li>The oldest one stands in Spain.</li></ul>",
            "  • The oldest one stands in Spain.",
        ),
        ("<ol><li>One.<li>Two.</ol>", "  1. One.\n  2. Two."),
    ],
)
def test_single_characters_and_lists_of_a_page_stay(tmp_path: Path, html: str, text: str) -> None:
    """Resiliparse 2.0.1 drops texts of one character outside of ASCII, and lists near the root."""
    pytest.importorskip("resiliparse")
    menu = "<nav><ul><li><a href=x>Menu</a></li></ul></nav>"
    page = f"<!doctype html><meta charset=utf-8><body>{menu}<article>{PROSE}{html}</article>"
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    (found,) = read_texts(tmp_path / "a.html")
    assert found.split("\n\n", 1)[1] == text
    assert "Menu" not in found


@pytest.mark.parametrize(
    ("text", "encoding", "declared"),
    [
        ("Café", "utf-8", ""),
        ("A ship… at sea", "utf-8", ""),
        ("Straße", "utf-8", "iso-8859-1"),
        ("彼は海", "shift_jis", "shift_jis"),
        ("彼は海", "iso-2022-jp", "iso-2022-jp"),
        ("그는 바다를 보았다", "euc-kr", "ks_c_5601-1987"),
        ("Größe über “alles”", "cp1252", "iso-8859-1"),
        ("Größe und Übermut", "latin-1", "utf-8"),
    ],
)
def test_short_pages_are_utf_8_if_valid_else_as_they_declare(
    tmp_path: Path, text: str, encoding: str, declared: str
) -> None:
    """Resiliparse 2.0.1 guesses cp1250 for one é in UTF-8, and cp1252 for a line of Shift JIS."""
    pytest.importorskip("resiliparse")
    page = f"<html><head><meta charset='{declared}'></head><body><p>{text}</p></body></html>"
    (tmp_path / "a.html").write_bytes(page.encode(encoding))
    assert read_texts(tmp_path / "a.html") == [text]


def test_a_list_in_a_piece_of_a_page_stays(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    (tmp_path / "a.html").write_text("<p>A ship.</p><ul><li>It sails.</li></ul>\n")
    assert read_texts(tmp_path / "a.html")[0].split() == ["A", "ship.", "•", "It", "sails."]


def test_an_invalid_byte_does_not_change_the_encoding_of_a_page(tmp_path: Path) -> None:
    """Resiliparse 2.0.1 reads the whole page as windows-1252 then."""
    pytest.importorskip("resiliparse")
    page = PAGE.replace("paragraph", "paragr\xe4ph").encode() + b"<p>\xff"
    (tmp_path / "a.html").write_bytes(page)
    (tmp_path / "b.html").write_bytes(PAGE.replace("utf-8", "latin1").encode("latin1"))
    for text, words in zip(read_texts(tmp_path), ("this paragräph", "änd"), strict=True):
        assert words in text
