"""JSON lines, JSON, CSV and Parquet: their documents, and the place of each skipped record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus_files import (
    FORMATS,
    PACKING,
    ROWS,
    as_parquet,
    read_texts,
    write_records,
)
from pretrain.corpus import records
from pretrain.corpus.documents import ReadingReport
from pretrain.corpus.reading import read_documents


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("suffix", "compress"), PACKING)
def test_all_record_formats_give_the_same_documents(
    tmp_path: Path, name: str, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(compress(FORMATS[name]()))
    found = list(read_documents(path, report=ReadingReport(strict=True)))
    assert [(d.id, d.title, d.text) for d in found] == [tuple(row.values()) for row in ROWS]


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"id": 1, "story": "s", "note": "much longer than that"}, "story"),
        ({"content": "c", "text": "t"}, "text"),
        ({"text": 5, "abstract": "the longest string", "k": "v"}, "abstract"),
    ],
)
def test_text_field_is_detected(tmp_path: Path, record: dict[str, object], field: str) -> None:
    report = ReadingReport()
    path = write_records(tmp_path / "a.jsonl", record, record)
    assert read_texts(path, report=report) == [record[field]] * 2
    assert report.text_fields == {"a.jsonl": field}


def test_lines_end_at_newline_bytes_only(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0cd"
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": t, "title": "T"}, ensure_ascii=False) for t in (text, "x\r\ny")]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = list(read_documents(path))
    assert [document.text for document in found] == [text, "x\ny"]
    assert found[1].title == "T"


def test_invalid_lines_are_skipped_and_reported(tmp_path: Path) -> None:
    good = b'{"text": "good"}'
    bad = {
        b'{"text": ': "invalid JSON",
        b'{"text": "\xff"}': "invalid UTF-8",
        b"5": "a number, not an object",
        b'{"other": "x"}': "no field 'text'",
        b'{"text": null}': "null, not a string",
        b'{"text": "  "}': "is empty",
        b'{"text": "a", "text": "b"}': "duplicate key",
        b'{"text": "a", "n": NaN}': "NaN",
        b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "invalid JSON",
        b"[" * 100_000: "nested too deeply",
    }
    path = tmp_path / "a.jsonl"
    lines = [good, *bad, good, good, good]
    path.write_bytes(b"\n".join(lines))
    report = ReadingReport()
    assert read_texts(path, report=report, text_field="text") == ["good"] * 4
    assert report.n_skipped_records == report.n_problems == len(bad)
    for number, (problem, (line, reason)) in enumerate(
        zip(report.problems, bad.items(), strict=True), start=2
    ):
        assert problem.line == number
        assert problem.offset == path.read_bytes().index(b"\n" + line + b"\n") + 1
        assert reason in problem.reason
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, byte 17: skipped: invalid JSON"):
        read_texts(path, report=ReadingReport(strict=True))


def test_only_the_first_problems_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"no\n" * 250 + b'{"text": "x"}\n')
    report = ReadingReport()
    assert read_texts(path, report=report) == ["x"]
    assert (report.n_problems, len(report.problems)) == (250, 100)
    assert json.loads(json.dumps(report.as_dict()))["n_skipped_records"] == 250


def test_lone_surrogate_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    report = ReadingReport()
    assert read_texts(path, report=report) == ["a\ufffdb \U0001f600"]
    assert report.n_repaired == 1


def test_no_field_of_a_document_has_a_lone_surrogate(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "title": "\\ud800", "id": "\\udfff"}')
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("y")
    first, second = read_documents(tmp_path)
    assert (first.id, first.title) == ("\ufffd", "\ufffd")
    assert second.id == second.source == "caf\\xe9.txt"


def test_too_long_line_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    path = write_records(
        tmp_path / "a.jsonl", {"text": "a"}, {"text": "b" * 2_000_000}, {"text": "c"}
    )
    report = ReadingReport()
    assert read_texts(path, report=report) == ["a", "c"]
    assert "more than 1,000 bytes" in report.problems[0].reason
    assert report.problems[0].line == 2


def test_invalid_csv_rows_are_reported_with_their_place(tmp_path: Path) -> None:
    lines = [b"id,text", b"1,good", b"2,too,many", b'3,"two', b'lines"', b"4,\xff", b"5,", b"6,end"]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\n".join(lines) + b"\n")
    report = ReadingReport()
    assert read_texts(path, report=report) == ["good", "two\nlines", "end"]
    assert [(p.line, p.offset) for p in report.problems] == [(3, 15), (6, 40), (7, 44)]
    reasons = [p.reason for p in report.problems]
    assert "3 cells, but the header has 2" in reasons[0]
    assert "invalid UTF-8" in reasons[1]
    assert "is empty" in reasons[2]


def test_last_line_of_spaces_is_not_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\none\n \n ")
    report = ReadingReport()
    assert read_texts(tmp_path / "a.csv", report=report) == ["one"]
    assert [problem.line for problem in report.problems] == [3]


def test_duplicate_column_names_keep_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,label,label\n7,good,a,the longest cell of all\n")
    (found,) = read_documents(tmp_path / "a.csv")
    assert (found.id, found.text) == ("7", "good")


def test_unterminated_quote_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "a.csv"
    path.write_bytes(b'text\ngood\n"never closed\n' + b"x" * 99 + b"\n" * 1200 + b"end\n")
    report = ReadingReport()
    assert read_texts(path, report=report) == ["good", "end"]
    assert [p.line for p in report.problems] == [3]
    assert "invalid CSV" in report.problems[0].reason


@pytest.mark.parametrize("cut", [8, 100, -1, -30])
def test_broken_parquet_is_reported(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.parquet").write_bytes(as_parquet()[:cut])
    (tmp_path / "b.txt").write_text("good", encoding="utf-8")
    report = ReadingReport()
    assert read_texts(tmp_path, report=report) == ["good"]
    assert report.n_partial_files == 1
    assert "Parquet file is broken" in report.problems[0].reason


def test_json_objects_and_nested_lists(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value, expected in (
        ({"data": [{"text": "a"}, 5, {"text": "b"}]}, ["a", "b"]),
        ({"text": "alone"}, ["alone"]),
        ({"text": "alone", "by": [{"name": "a longer text"}]}, ["alone"]),
        ({"title": "T", "abstract": "whole", "tags": ["a", "b"]}, ["whole"]),
        ([], []),
        ("text", []),
    ):
        path.write_text(json.dumps(value), encoding="utf-8")
        assert read_texts(path) == expected
    path.write_text('[{"text": "a"}, ', encoding="utf-8")
    report = ReadingReport()
    assert read_texts(path, report=report) == []
    assert "invalid JSON" in report.problems[0].reason
