"""Readers: every document is found in order, and whatever is none is named with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus_files import COMPRESSORS, FORMATS, PACKING, PAGE, ROWS, WIDE, as_parquet, as_warc
from pretrain.corpus import (
    Document,
    ReadingReport,
    bundled_corpus,
    list_files,
    read_documents,
    reading,
    rows,
    streams,
)
from pretrain.corpus.files import Source, SourceFile


def texts(source: Source, **options: object) -> list[str]:
    return [document.text for document in read_documents(source, **options)]  # type: ignore[arg-type]


def write_records(path: Path, *records: object) -> Path:
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    return path


def test_bundled_corpus_is_whole() -> None:
    report = ReadingReport()
    documents = list(read_documents("bundled", report=report))
    assert (report.n_documents, report.n_text_bytes) == (371, 11_972_889)
    assert report.n_problems == 0
    assert len({document.id for document in documents}) == 371
    assert documents[0].title == "State of the Union Address, 1790"
    assert report.n_read_bytes == bundled_corpus().stat().st_size


def test_folder_in_order_of_relative_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.txt", "a.txt", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    write_records(tmp_path / "c.jsonl", {"text": "one"}, {"text": "two"})
    found = list(read_documents(tmp_path))
    names = ["a.txt", "a/b/c.txt", "a/z.md", "b.txt", "c.jsonl:1", "c.jsonl:2"]
    assert [document.id for document in found] == names
    name = "a/b/c.txt"
    assert found[1] == Document(id=name, text=name, source=name, source_argument=str(tmp_path))


def test_folder_passes_over_links_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "table.csv").write_text("1,2")
    os.mkfifo(tmp_path / "pipe.txt")
    report = ReadingReport()
    assert [file.name for file in list_files(tmp_path, report=report)] == ["a.txt", "table.csv"]
    reasons = {problem.file: problem.reason for problem in report.problems}
    assert set(reasons) == {"loop", "again.txt", "pipe.txt"}
    assert "symbolic link" in reasons["loop"]
    assert "pipe" in reasons["pipe.txt"]
    with pytest.raises(ValueError, match="a pipe, not a regular file"):
        list_files(tmp_path / "pipe.txt")


def test_what_this_program_has_written_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for folder, marks in (
        ("runs/a-1", "config.yaml environment.json tokenizer"),
        ("b", "asked.yaml"),
        ("imported", "config.yaml checkpoints tokenizer"),
        ("prepared", "manifest.json report.json tokenizer"),
        ("mine", "config.yaml environment.json"),  # not ours, whatever they are
    ):
        (tmp_path / folder).mkdir(parents=True)
        for name in [*marks.split(), "samples.jsonl"]:
            (tmp_path / folder / name).write_text("{}")
    report = ReadingReport()
    found = {file.name.split("/")[0] for file in list_files(tmp_path, report=report)}
    assert found == {"a.txt", "mine"}
    problems = " ".join(problem.file for problem in report.problems)
    assert problems == "b/ imported/ prepared/ runs/a-1/"
    with pytest.raises(ValueError, match="resume a run with pretrain train --resume --run DIR"):
        list_files(tmp_path / "runs/a-1")


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains no file; readable formats are text"):
        list_files(tmp_path)
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7\n\0\x01")
    report = ReadingReport()
    assert texts(tmp_path, report=report, strict=True) == []
    assert (report.n_skipped_files, report.problems[0].offset) == (1, 9)
    with pytest.raises(ValueError, match=r"a\.pdf, byte 9: binary.*readable formats are text"):
        texts(tmp_path / "a.pdf")


def test_missing_path_suggests_near_names(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(ValueError, match=r"shakespear\.txt.*does not exist.*'shakespeare\.txt'"):
        list_files(tmp_path / "shakespear.txt")


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"id": 1, "story": "s", "note": "much longer than that"}, "story"),
        ({"content": "c", "text": "t"}, "text"),
        ({"text": 5, "abstract": "the longest string", "k": "v"}, "abstract"),
    ],
)
def test_text_field_is_found(tmp_path: Path, record: dict[str, object], field: str) -> None:
    report = ReadingReport()
    path = write_records(tmp_path / "a.jsonl", record, record)
    assert texts(path, report=report) == [record[field]] * 2
    assert report.text_fields == {"a.jsonl": field}


def test_lines_end_at_newline_bytes_only(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0cd"
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": t, "title": "T"}, ensure_ascii=False) for t in (text, "x\r\ny")]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = list(read_documents(path))
    assert [document.text for document in found] == [text, "x\ny"]
    assert found[1].title == "T"


def test_bad_lines_are_skipped_and_placed(tmp_path: Path) -> None:
    good = b'{"text": "good"}'
    bad = {
        b'{"text": ': "invalid JSON",
        b'{"text": "\xff"}': "invalid UTF-8",
        b"5": "a number, not an object",
        b'{"other": "x"}': "no field 'text'",
        b'{"text": null}': "null, not a string",
        b'{"text": "  "}': "is empty",
        b'{"text": "a", "text": "b"}': "occurs twice",
        b'{"text": "a", "n": NaN}': "NaN",
        b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "invalid JSON",
        b"[" * 100_000: "nested too deeply",
    }
    path = tmp_path / "a.jsonl"
    lines = [good, *bad, good, good, good]
    path.write_bytes(b"\n".join(lines))
    report = ReadingReport()
    assert texts(path, report=report, text_field="text") == ["good"] * 4
    assert report.n_skipped_records == report.n_problems == len(bad)
    for number, (problem, (line, reason)) in enumerate(
        zip(report.problems, bad.items(), strict=True), start=2
    ):
        assert problem.line == number
        assert problem.offset == path.read_bytes().index(b"\n" + line + b"\n") + 1
        assert reason in problem.reason
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, byte 17: skipped: invalid JSON"):
        texts(path, strict=True)


def test_only_the_first_problems_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"no\n" * 250 + b'{"text": "x"}\n')
    report = ReadingReport()
    assert texts(path, report=report) == ["x"]
    assert (report.n_problems, len(report.problems)) == (250, 100)
    assert json.loads(json.dumps(report.as_dict()))["n_skipped_records"] == 250


def test_lone_surrogate_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    report = ReadingReport()
    assert texts(path, report=report) == ["a\ufffdb \U0001f600"]
    assert report.n_repaired == 1


def test_nothing_of_a_document_keeps_a_lone_surrogate(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "title": "\\ud800", "id": "\\udfff"}')
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("y")
    first, second = read_documents(tmp_path)
    assert (first.id, first.title) == ("\ufffd", "\ufffd")
    assert second.id == second.source == "caf\\xe9.txt"


def test_too_long_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_RECORD_BYTES", 1000)
    path = write_records(
        tmp_path / "a.jsonl", {"text": "a"}, {"text": "b" * 2_000_000}, {"text": "c"}
    )
    report = ReadingReport()
    assert texts(path, report=report) == ["a", "c"]
    assert "more than 1,000 bytes" in report.problems[0].reason
    assert report.problems[0].line == 2


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfa\r\nb\n\xef\xbb\xbf", "a\nb\n\ufeff"),
        ("häß".encode("utf-16"), "häß"),
        (b"\xfe\xff" + "häß".encode("utf-16-be"), "häß"),
        (b"a\rb", "a\rb"),
    ],
)
def test_text_encodings(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert texts(tmp_path / "a.txt") == [text]


def test_few_bad_bytes_are_replaced_and_many_are_binary(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 500 + b"\xff" + b"y" * 500)
    report = ReadingReport()
    assert texts(path, report=report) == ["x" * 500 + "\ufffd" + "y" * 500]
    assert report.problems[0].offset == 500
    with pytest.raises(ValueError, match="byte 500"):
        texts(path, strict=True)

    path.write_bytes(b"caf\xe9 " * 10)
    with pytest.raises(ValueError, match=r"byte 3: not UTF-8 text: 10 invalid"):
        texts(path)
    path.write_bytes(b"abc\0def")
    with pytest.raises(ValueError, match=r"byte 3: binary"):
        texts(path)
    (tmp_path / "b.txt").write_text("good")
    report = ReadingReport()
    assert texts(tmp_path, report=report) == ["good"]
    assert report.n_skipped_files == 1


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSORS)
def test_compressed_whole_members_and_truncated(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    draw = random.Random(0)
    # Several bzip2 blocks, so that a truncated file still has something to keep.
    wanted = [f"{n} " + draw.randbytes(300).hex() for n in range(1500)]
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in wanted)
    half = data.index(b"\n", len(data) // 2) + 1
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(data[:half]) + compress(data[half:]))
    assert texts(path) == wanted

    path.write_bytes(compress(data)[:-1000])
    report = ReadingReport()
    found = texts(path, report=report)
    assert wanted[: len(found)] == found
    assert 300 < len(found) < 1500
    assert report.n_partial_files == 1
    assert "truncated" in report.problems[0].reason
    with pytest.raises(ValueError, match="truncated"):
        texts(path, strict=True)


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSORS)
def test_garbage_under_a_compressed_name(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    for data in (b"no such format" * 10, b"", compress(b'{"text": "x"}\n') + b"garbage" * 9):
        path.write_bytes(data)
        report = ReadingReport()
        found = texts(path, report=report)
        assert found == (["x"] if len(data) > 0 and data[:2] != b"no" else [])
        assert report.n_problems <= 1
        if not found:
            assert report.n_partial_files == 1


def test_a_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BOMB_BYTES", 1 << 18)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * (1 << 22)))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(b'{"text": "' + b" " * (1 << 22)))
    (tmp_path / "c.csv.bz2").write_bytes(bz2.compress(b"text\n" + b"a\n" * (1 << 21)))
    (tmp_path / "d.html.gz").write_bytes(gzip.compress(b"<html>" + b"a" * (1 << 22)))
    report = ReadingReport()
    found = {document.source for document in read_documents(tmp_path, report=report)}
    assert report.n_partial_files == 4
    assert sum("a decompression bomb" in problem.reason for problem in report.problems) == 4
    assert {"a.txt.gz", "c.csv.bz2"} <= found


@pytest.mark.parametrize("mark", ["\n\n", "\n", " ", ""])
def test_a_long_text_is_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 1000)
    draw = random.Random(0)
    text = "".join(draw.choice("aéß中🙂") * draw.randint(1, 20) + mark for _ in range(500))
    path = tmp_path / "a.txt"
    path.write_text("\ufeff" + text, encoding="utf-8")
    found = list(read_documents(path))
    assert "".join(document.text for document in found) == text
    assert len(found) > 10
    assert [d.id for d in found] == ["a.txt", *(f"a.txt#{n}" for n in range(2, len(found) + 1))]
    for document in found[1:]:
        size = len(document.text.encode())
        assert path.read_bytes()[document.offset :][:size].decode() == document.text
        assert size <= 1000
        assert not mark or document.text.endswith(mark)


def test_ten_million_empty_lines_pass(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.csv"):
        (tmp_path / name).write_bytes(b"\n" * (10_000_000 if name == "a.txt" else 1_000_000))
    report = ReadingReport()
    assert texts(tmp_path, report=report) == []
    assert [problem.file for problem in report.problems] == ["a.txt", "b.jsonl", "c.csv"]


def test_several_sources_are_read_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("third", encoding="utf-8")
    (tmp_path / "z.jsonl").write_text('{"text": "first"}\n', encoding="utf-8")
    sources = [tmp_path / "z.jsonl", tmp_path / "books", tmp_path / "a.txt"]
    assert texts(sources) == ["first", "second", "third"]
    names = [file.name for file in list_files(sources)]
    places = [tmp_path / "z.jsonl", tmp_path / "books" / "b.txt", tmp_path / "a.txt"]
    assert names == [place.as_posix() for place in places]
    # One source in a list is that source.
    assert list_files([tmp_path / "books"]) == list_files(tmp_path / "books")


@pytest.mark.parametrize("second", ["books", "books/b.txt"])
def test_a_file_is_never_read_twice(tmp_path: Path, second: str) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match="would be read twice"):
        list_files([tmp_path / "books", tmp_path / second])
    for nothing in ([], "", [str(tmp_path), ""]):
        with pytest.raises(ValueError, match="no source of text"):
            list_files(nothing)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("suffix", "compress"), PACKING)
def test_every_format_of_records_gives_the_same_documents(
    tmp_path: Path, name: str, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(compress(FORMATS[name]()))
    found = list(read_documents(path, strict=True))
    assert [(d.id, d.title, d.text) for d in found] == [tuple(row.values()) for row in ROWS]


@pytest.mark.parametrize(("suffix", "compress"), PACKING)
def test_pages_give_their_main_text(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    pytest.importorskip("resiliparse")
    (tmp_path / f"page.html{suffix}").write_bytes(compress(PAGE.encode()))
    (tmp_path / f"pages.warc{suffix}").write_bytes(compress(as_warc()))
    report = ReadingReport()
    page, answer, plain = read_documents(tmp_path, report=report, strict=True)
    assert page.title == "A page"
    assert page.text.startswith("Whales\n")
    assert "whale much is told, änd" in page.text
    assert "Home" not in page.text
    assert (answer.id, answer.text, answer.title) == ("http://a/", page.text, "A page")
    assert (plain.id, plain.text) == ("http://b/", "Plain tëxt.")
    assert as_warc()[answer.offset :].startswith(b"WARC/1.0\r\nWARC-Type: response")
    assert (report.n_other_records, report.n_problems) == (1, 0)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("lies.txt", FORMATS["rows.jsonl"]),
        ("data", FORMATS["rows.jsonl"]),
        *((f"wide-{n}", lambda n=n: FORMATS[n]().decode().encode("utf-16")) for n in WIDE),
        ("c4-train.00000-of-01024.json", FORMATS["rows.jsonl"]),
        ("page.aspx", lambda: b"\xef\xbb\xbf" + PAGE.encode()),
        ("download.bin", as_parquet),
        ("no-suffix", lambda: gzip.compress(FORMATS["rows.jsonl"]())),
        ("page.txt", PAGE.encode),
        ("wide.html", lambda: PAGE.encode("utf-32")),
        ("crawl", lambda: gzip.compress(as_warc())),
    ],
)
def test_the_content_tells_the_format(tmp_path: Path, name: str, made: Callable[[], bytes]) -> None:
    pytest.importorskip("resiliparse")
    (tmp_path / name).write_bytes(made())
    first = texts(tmp_path / name, strict=True)[0]
    assert first.startswith(("First, with a comma", "Whales\n"))


def test_what_looks_like_a_format_and_is_text(tmp_path: Path) -> None:
    for text in ("{not json}\n{at all}\n", "[1, 2]\n", "a,b,c\n1,2,3\n", "PAR0", "<p>html?</p>"):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert texts(tmp_path / "a.txt") == [text]
    (tmp_path / "program.py").write_text("print(1)\n", encoding="utf-8")
    assert texts(tmp_path / "program.py") == ["print(1)\n"]


def test_a_gzip_name_without_gzip_inside_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_text("never compressed", encoding="utf-8")
    report = ReadingReport()
    assert texts(tmp_path, report=report) == []
    assert "name is that of a gzip file, but it does not start like" in report.problems[0].reason


def test_bad_rows_of_a_table_are_placed(tmp_path: Path) -> None:
    lines = [b"id,text", b"1,good", b"2,too,many", b'3,"two', b'lines"', b"4,\xff", b"5,", b"6,end"]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\n".join(lines) + b"\n")
    report = ReadingReport()
    assert texts(path, report=report) == ["good", "two\nlines", "end"]
    assert [(p.line, p.offset) for p in report.problems] == [(3, 15), (6, 40), (7, 44)]
    reasons = [p.reason for p in report.problems]
    assert "3 cells, but the header has 2" in reasons[0]
    assert "invalid UTF-8" in reasons[1]
    assert "is empty" in reasons[2]


def test_columns_of_one_name_rename_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,label,label\n7,good,a,the longest cell of all\n")
    (found,) = read_documents(tmp_path / "a.csv")
    assert (found.id, found.text) == ("7", "good")


def test_a_quote_that_never_ends_costs_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "a.csv"
    path.write_bytes(b'text\ngood\n"never closed\n' + b"x" * 99 + b"\n" * 1200 + b"end\n")
    report = ReadingReport()
    assert texts(path, report=report) == ["good", "end"]
    assert [p.line for p in report.problems] == [3]
    assert "invalid CSV" in report.problems[0].reason


@pytest.mark.parametrize("cut", [8, 100, -1, -30])
def test_broken_parquet_is_reported(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.parquet").write_bytes(as_parquet()[:cut])
    (tmp_path / "b.txt").write_text("good", encoding="utf-8")
    report = ReadingReport()
    assert texts(tmp_path, report=report) == ["good"]
    assert report.n_partial_files == 1
    assert "Parquet file is broken" in report.problems[0].reason


@pytest.mark.parametrize("cut", [20, 300, -40])
def test_a_cut_archive_keeps_what_came_before(tmp_path: Path, cut: int) -> None:
    pytest.importorskip("fastwarc")
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(as_warc())[:cut])
    report = ReadingReport()
    found = texts(tmp_path, report=report)
    assert report.n_partial_files == 1
    assert all(text.startswith(("Whales", "Plain")) for text in found)


def test_answers_of_an_archive_are_unpacked_decoded_or_left_out(tmp_path: Path) -> None:
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


def test_json_that_is_no_list_of_records(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value, wanted in (
        ({"data": [{"text": "a"}, 5, {"text": "b"}]}, ["a", "b"]),
        ({"text": "alone"}, ["alone"]),
        ({"text": "alone", "by": [{"name": "a longer text"}]}, ["alone"]),
        ({"title": "T", "abstract": "whole", "tags": ["a", "b"]}, ["whole"]),
        ([], []),
        ("text", []),
    ):
        path.write_text(json.dumps(value), encoding="utf-8")
        assert texts(path) == wanted
    path.write_text('[{"text": "a"}, ', encoding="utf-8")
    report = ReadingReport()
    assert texts(path, report=report) == []
    assert "invalid JSON" in report.problems[0].reason


def test_patterns(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "[1].txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert texts(str(tmp_path / "[ab].txt")) == ["a.txt", "b.txt"]
    assert texts(str(tmp_path / "[1].txt")) == ["[1].txt"]
    with pytest.raises(ValueError, match="no file matches the pattern"):
        texts(str(tmp_path / "*.pdf"))


def test_a_file_that_cannot_be_opened_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreadable, or gone since it was listed; root may read everything, hence the patch."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")

    def refusing(file: SourceFile) -> bytes:
        if file.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return b"text"

    monkeypatch.setattr(reading, "read_head", refusing)
    report = ReadingReport()
    assert texts(tmp_path, report=report) == ["b.txt"]
    assert "cannot be read: Permission denied" in report.problems[0].reason
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        texts(tmp_path / "a.txt")
