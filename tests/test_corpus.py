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

from pretrain.corpus import Document, ReadingReport, bundled_corpus, list_files, read_documents
from pretrain.corpus import records as records_file
from pretrain.corpus.files import Source


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
    assert found[1] == Document(id="a/b/c.txt", text="a/b/c.txt", source="a/b/c.txt")


def test_folder_passes_over_links_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "table.csv").write_text("1,2")
    os.mkfifo(tmp_path / "pipe.txt")
    report = ReadingReport()
    assert [file.name for file in list_files(tmp_path, report=report)] == ["a.txt"]
    reasons = {problem.file: problem.reason for problem in report.problems}
    assert set(reasons) == {"loop", "again.txt", "table.csv", "pipe.txt"}
    assert "symbolic link" in reasons["loop"]
    assert "pipe" in reasons["pipe.txt"]
    with pytest.raises(ValueError, match="a pipe, not a regular file"):
        list_files(tmp_path / "pipe.txt")


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"no readable file \(found: 1 x \.pdf\).*\.jsonl"):
        list_files(tmp_path)
    with pytest.raises(ValueError, match=r"legal are \.txt"):
        list_files(tmp_path / "a.pdf")


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


def test_too_long_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_file, "MAX_LINE_BYTES", 1000)
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


def zstd_compress(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    compressed: bytes = zstandard.ZstdCompressor().compress(data)
    return compressed


COMPRESSORS: list[tuple[str, Callable[[bytes], bytes]]] = [
    (".gz", gzip.compress),
    (".bz2", lambda data: bz2.compress(data, 1)),
    (".xz", lambda data: lzma.compress(data, preset=0)),
    (".zst", zstd_compress),
]


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
    assert "cut off" in report.problems[0].reason
    with pytest.raises(ValueError, match="cut off"):
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


def test_a_bomb_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.corpus import reading

    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 1 << 20)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"x" * (1 << 24)))
    with pytest.raises(ValueError, match="split it into several files"):
        texts(path)


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
    with pytest.raises(ValueError, match="no source"):
        list_files([])
