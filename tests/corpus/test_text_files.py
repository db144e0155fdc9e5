"""Text files: encodings, invalid bytes, long texts, compression and detection of the format."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus_files import (
    COMPRESSORS,
    FORMATS,
    PACKING,
    PAGE,
    WIDE,
    as_parquet,
    as_warc,
    read_texts,
    zstd_compress,
)
from pretrain.corpus import files, reading
from pretrain.corpus.documents import ReadingReport
from pretrain.corpus.reading import read_documents


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfa\r\nb\n\xef\xbb\xbf", "a\nb\n\ufeff"),
        ("häß".encode("utf-16"), "häß"),
        (b"\xfe\xff" + "häß".encode("utf-16-be"), "häß"),
        (b"a\rb", "a\nb"),
    ],
)
def test_text_encodings(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert read_texts(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv"])
def test_lines_of_old_macintosh_files_end_at_a_carriage_return(tmp_path: Path, name: str) -> None:
    data = FORMATS[name]().replace(b"\r\n", b"\n")
    (tmp_path / f"unix-{name}").write_bytes(data)
    (tmp_path / f"mac-{name}").write_bytes(data.replace(b"\n", b"\r"))
    mac, unix = (read_texts(tmp_path / f"{kind}-{name}") for kind in ("mac", "unix"))
    assert mac == unix
    assert len(unix) == 2


@pytest.mark.parametrize(("suffix", "compress"), PACKING)
@pytest.mark.parametrize("n_bytes", [4094, 4095, 8191, files.HEAD_BYTES - 1, files.CHUNK_BYTES - 1])
def test_a_carriage_return_far_from_its_newline_is_none_of_old_macintosh(
    tmp_path: Path, n_bytes: int, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"x" * n_bytes + b"\r\nsecond\r\nthird\r\n"))
    assert read_texts(tmp_path) == ["x" * n_bytes + "\nsecond\nthird\n"]
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"\r" + b"x" * n_bytes + b"\r\nb\r\nc\r"))
    assert read_texts(tmp_path) == ["\n" + "x" * n_bytes + "\nb\nc\n"]


@pytest.mark.parametrize("number", [0x50, 0x5F])
def test_zstandard_may_begin_with_a_skippable_frame(tmp_path: Path, number: int) -> None:
    """As files of pzstd do; RFC 8878, section 3.1.2. `zstd -t` accepts them."""
    data = bytes([number]) + b"*M\x18\x04\0\0\0abcd" + zstd_compress(b'{"text": "read"}\n')
    for name in ("a.jsonl.zst", "no-suffix"):
        (tmp_path / name).write_bytes(data)
        assert read_texts(tmp_path / name, report=ReadingReport(strict=True)) == ["read"]


def test_zstandard_with_the_longest_window_is_read(tmp_path: Path) -> None:
    """As `zstd --long=31` writes it, and the dumps of Reddit are; 2 GiB of window are declared."""
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, hash_log=10)
    frame = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    # Without a declared size of the content, the size of the window counts.
    data = frame.compress(b'{"text": "read"}\n' * 20) + frame.flush()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(data)
    assert zstandard.get_frame_parameters(data).window_size == 1 << 31
    assert read_texts(path, report=ReadingReport(strict=True)) == ["read"] * 20


@pytest.mark.parametrize("is_packed", [False, True])
def test_zstandard_dictionary_in_the_first_frame_is_used(tmp_path: Path, is_packed: bool) -> None:
    """The form of .warc.zst files; IIPC, Zstandard for WARC, 2021."""
    zstandard = pytest.importorskip("zstandard")
    texts = [f"the ship number {n} sails on to {7 * n}" for n in range(300)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    dictionary = zstandard.train_dictionary(2048, lines)
    first = dictionary.as_bytes()
    first = zstd_compress(first) if is_packed else first
    frames = [zstandard.ZstdCompressor(dict_data=dictionary).compress(line) for line in lines]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"]*M\x18" + len(first).to_bytes(4, "little") + first + b"".join(frames))
    assert read_texts(path, report=ReadingReport(strict=True)) == texts


def test_few_invalid_bytes_are_replaced_and_many_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 500 + b"\xff" + b"y" * 500)
    report = ReadingReport()
    assert read_texts(path, report=report) == ["x" * 500 + "\ufffd" + "y" * 500]
    assert report.problems[0].offset == 500
    with pytest.raises(ValueError, match="byte 500"):
        read_texts(path, report=ReadingReport(strict=True))

    path.write_bytes(b"caf\xe9 " * 10)
    with pytest.raises(ValueError, match=r"byte 3: not UTF-8 text: 10 invalid"):
        read_texts(path)
    path.write_bytes(b"abc\0def")
    with pytest.raises(ValueError, match=r"byte 3: binary"):
        read_texts(path)
    (tmp_path / "b.txt").write_text("good")
    report = ReadingReport()
    assert read_texts(tmp_path, report=report) == ["good"]
    assert report.n_skipped_files == 1


@pytest.mark.parametrize("mark", ["\n\n", "\n", " ", ""])
def test_long_text_is_split_into_documents(
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


def test_files_of_empty_lines_are_skipped(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.csv"):
        (tmp_path / name).write_bytes(b"\n" * (10_000_000 if name == "a.txt" else 1_000_000))
    report = ReadingReport()
    assert read_texts(tmp_path, report=report) == []
    assert [problem.file for problem in report.problems] == ["a.txt", "b.jsonl", "c.csv"]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSORS)
def test_compressed_members_and_truncated_files(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    draw = random.Random(0)
    # Several bzip2 blocks, so that a truncated file still has something to keep.
    expected = [f"{n} " + draw.randbytes(300).hex() for n in range(1500)]
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in expected)
    half = data.index(b"\n", len(data) // 2) + 1
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(data[:half]) + compress(data[half:]))
    assert read_texts(path) == expected

    path.write_bytes(compress(data)[:-1000])
    report = ReadingReport()
    found = read_texts(path, report=report)
    assert expected[: len(found)] == found
    assert 300 < len(found) < 1500
    assert report.n_partial_files == 1
    assert "truncated" in report.problems[0].reason
    with pytest.raises(ValueError, match="truncated"):
        read_texts(path, report=ReadingReport(strict=True))


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSORS)
def test_garbage_with_a_compressed_name_is_reported(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    for data in (b"no such format" * 10, b"", compress(b'{"text": "x"}\n') + b"garbage" * 9):
        path.write_bytes(data)
        report = ReadingReport()
        found = read_texts(path, report=report)
        assert found == (["x"] if len(data) > 0 and data[:2] != b"no" else [])
        assert report.n_problems <= 1
        if not found:
            assert report.n_partial_files == 1


def test_gzip_name_without_gzip_content_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_text("never compressed", encoding="utf-8")
    report = ReadingReport()
    assert read_texts(tmp_path, report=report) == []
    assert "name is that of a gzip file, but it does not start like" in report.problems[0].reason


def test_decompression_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BOMB_BYTES", 1 << 18)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * (1 << 22)))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(b'{"text": "' + b" " * (1 << 22)))
    (tmp_path / "c.csv.bz2").write_bytes(bz2.compress(b"text\n" + b"a\n" * (1 << 21)))
    (tmp_path / "d.html.gz").write_bytes(gzip.compress(b"<html>" + b"a" * (1 << 22)))
    report = ReadingReport()
    found = {document.source for document in read_documents(tmp_path, report=report)}
    assert report.n_partial_files == 4
    assert sum("a decompression bomb" in problem.reason for problem in report.problems) == 4
    assert {"a.txt.gz", "c.csv.bz2"} <= found


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
def test_format_is_detected_from_content(
    tmp_path: Path, name: str, made: Callable[[], bytes]
) -> None:
    pytest.importorskip("resiliparse")
    (tmp_path / name).write_bytes(made())
    first = read_texts(tmp_path / name, report=ReadingReport(strict=True))[0]
    assert first.startswith(("First, with a comma", "Whales\n"))


def test_text_that_resembles_a_format_is_read_as_text(tmp_path: Path) -> None:
    for text in ("{not json}\n{at all}\n", "[1, 2]\n", "a,b,c\n1,2,3\n", "PAR0", "<p>html?</p>"):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert read_texts(tmp_path / "a.txt") == [text]
    (tmp_path / "program.py").write_text("print(1)\n", encoding="utf-8")
    assert read_texts(tmp_path / "program.py") == ["print(1)\n"]
