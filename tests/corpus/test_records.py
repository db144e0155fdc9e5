"""JSON lines, JSON, CSV and Parquet: their documents, and the place of each skipped record."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corpus_files import (
    FORMATS,
    PACKING,
    ROWS,
    as_parquet,
    read_texts,
    write_records,
)
from pretrain.corpus import records, tables
from pretrain.corpus.documents import ReadingReport
from pretrain.corpus.files import FileStream, list_files
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


def fields_read(tmp_path: Path, *records: object, text_field: str | None = None) -> Any:
    """The first text of records, the field that was read, and its details."""
    report = ReadingReport()
    path = write_records(tmp_path / "a.jsonl", *records)
    texts = read_texts(path, report=report, text_field=text_field)
    field = report.text_fields.get("a.jsonl")
    return (texts or [report.problems[0].reason])[0], field, report.field_details.get("a.jsonl")


ADDRESS = "https://example.org/a/long/address/that/is/longer/than/all/of/the/text/1"


@pytest.mark.parametrize(
    ("record", "text", "field"),
    [
        ({"url": ADDRESS, "text": ["one", "two"]}, "one\n\ntwo", "text"),
        ({"url": ADDRESS, "text": {"body": "one two"}}, "one two", "text.body"),
        ({"source": "s2orc", "content": {"source": ADDRESS, "text": "a"}}, "a", "content.text"),
        ({"_id": ADDRESS, "_source": {"story_text": "one two"}}, "one two", "_source.story_text"),
        (
            {"id": ADDRESS, "messages": [{"role": "user", "content": "hi"}, {"content": "ho"}]},
            "hi\n\nho",
            "messages",
        ),
        (
            {"id": ADDRESS, "conversations": [{"from": "human", "value": "hi"}]},
            "hi",
            "conversations",
        ),
        (
            {"messages": [{"content": [{"type": "text", "text": "a"}, {"type": "image"}]}]},
            "a",
            "messages",
        ),
        ({"context": "a b c", "answers": {"text": ["a"], "start": [0]}}, "a b c", "context"),
    ],
)
def test_text_in_lists_objects_and_chats_is_found(
    tmp_path: Path, record: dict[str, object], text: str, field: str
) -> None:
    assert fields_read(tmp_path, record, record)[:2] == (text, field)


def test_addresses_and_codes_are_not_taken_for_the_text(tmp_path: Path) -> None:
    reason, field, _ = fields_read(tmp_path, {"url": ADDRESS, "id": "s2-orc", "n": [1, 2]})
    assert field is None
    assert reason == (
        "skipped: no field is text; its fields are 'url', 'id', 'n'; --text-field NAME takes one"
    )
    assert fields_read(tmp_path, {"url": ADDRESS, "title": "A ship"})[:2] == ("A ship", "title")
    assert fields_read(tmp_path, {"url": ADDRESS}, text_field="url")[0] == ADDRESS
    reason = fields_read(tmp_path, {"text": {"fr": "deux"}}, text_field="text")[0]
    assert reason == (
        "skipped: field 'text' is an object, not a string; --text-field text.fr names a field of it"
    )


def test_the_only_field_is_the_text_whatever_it_contains(tmp_path: Path) -> None:
    molecule = "C1=CC=CC=C1"
    assert fields_read(tmp_path, {"smiles": molecule})[:2] == (molecule, "smiles")


def test_text_that_is_null_in_the_first_records_is_waited_for(tmp_path: Path) -> None:
    nothing = {"title": "A title", "text": None}
    report = ReadingReport()
    path = write_records(tmp_path / "a.jsonl", *[nothing] * 25, {"title": "B", "text": "read"})
    assert read_texts(path, report=report) == ["read"]
    assert report.n_skipped_records == 25


QUESTION = {"question": "Where does the ship lie?", "answer": "In the bay.", "source": "", "n": 1}


def test_what_was_guessed_and_left_out_is_recorded(tmp_path: Path) -> None:
    text, field, details = fields_read(tmp_path, QUESTION, QUESTION)
    assert (text, field) == ("Where does the ship lie?", "question")
    percent = round(100 * 24 / (24 + 11), 1)
    joined = {"left_out": ["answer"], "joined": "question,answer", "html": False}
    assert details == {"percent": percent} | joined
    report = ReadingReport()
    path = write_records(
        tmp_path / "b.jsonl", {"url": ADDRESS, "a": "one two", "b": "one two three"}
    )
    assert read_texts(path, report=report) == ["one two three"]
    assert report.facts()["field"] == (
        "guessed: 'b', 65 % of the letters, without a (text_field a,b joins them)"
    )
    # Text that no field can name is counted.
    record = {"title": "A title", "paragraphs": [{"context": "one two " * 9, "n": 1}]}
    details = fields_read(tmp_path, record)[2]
    assert (details["percent"], details["left_out"]) == (8.9, ["paragraphs"])
    assert details["joined"] == "title"


def test_the_file_of_which_a_field_is_the_smallest_part_is_named(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", {"text": "one two"})
    write_records(tmp_path / "b.jsonl", {"text": "one <p>two", "notes": "three four five six"})
    write_records(tmp_path / "c.jsonl", {"text": "one two", "n": 1})
    write_records(tmp_path / "d.jsonl", {"text": "one two", "notes": "three four"})
    report = ReadingReport()
    read_texts(tmp_path, report=report)
    assert report.facts()["field"].startswith(
        "guessed: 'text' (least in b.jsonl, d.jsonl), 34.5 % of the"
    )
    assert "as HTML" in report.facts()["field"]


def test_every_file_with_skipped_records_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('["one"]\n["two"]\n{"text": "three"}\n')
    report = ReadingReport()
    assert len(read_texts(tmp_path, report=report)) == 2
    places = "(a.jsonl, line 1, byte 0; b.jsonl, line 1, byte 0; ...)"
    assert report.facts()["skipped"].endswith(f"a list, not an object {places}")


@pytest.mark.parametrize(
    ("text_field", "text"),
    [
        ("question,answer", "Where does the ship lie?\n\nIn the bay."),
        ("answer, question", "In the bay.\n\nWhere does the ship lie?"),
        ("source,answer", "In the bay."),
        ("question,reply", "skipped: no field 'reply'; its fields are 'question', 'answer', "),
        ("question,n", "skipped: field 'n' is a number, not a string"),
    ],
)
def test_several_fields_are_joined_in_the_given_order(
    tmp_path: Path, text_field: str, text: str
) -> None:
    found, _, details = fields_read(tmp_path, QUESTION, text_field=text_field)
    assert found.startswith(text)
    if text_field == "question,answer":
        assert (details["percent"], details["left_out"]) == (100.0, [])
    record = {"a": {"b,c": "one"}, "d,e": "two", "f.g": "three"}
    assert fields_read(tmp_path, record, text_field="d,e")[0] == "two"
    assert fields_read(tmp_path, record, text_field="f.g")[0] == "three"


def test_html_in_a_field_is_noted_and_can_be_read_as_text(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    body = "<p>How do I light a <code>lamp</code> &amp; keep <b>海</b>?</p><ul><li>So</li></ul>"
    record = {"Title": "Lamps", "Body": body}
    text, field, details = fields_read(tmp_path, record, record)
    assert (text, field, details["html"]) == (body, "Body", True)
    text, field, details = fields_read(tmp_path, record, text_field="Title,html:Body")
    assert text == "Lamps\n\nHow do I light a lamp & keep 海?\n\n  • So"
    assert (field, details["html"]) == ("Title,html:Body", False)


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl", ""])
def test_json_lines_are_found_under_any_name_however_long_they_are(
    tmp_path: Path, suffix: str
) -> None:
    """Dolma's files are JSON lines called .json.gz; `to_json` of datasets 4.x writes .json."""
    texts = [f"book {number} " + "calm sea " * 20_000 for number in range(5)]
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    path = tmp_path / f"books{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert read_texts(path, report=ReadingReport(strict=True)) == texts
    # A short first line, and a line that is broken.
    path = tmp_path / "b.json"
    path.write_bytes(b'\xef\xbb\xbf{"text": "short"}\n' + data + b"{\n")
    report = ReadingReport()
    assert read_texts(path, report=report) == ["short", *texts]
    assert [problem.line for problem in report.problems] == [7]


@pytest.mark.parametrize(
    ("first", "line"),
    [
        ('{"text": "x", "n": NaN}', 1),
        pytest.param('{"n": NaN, "text": "%s"}' % ("x " * 40_000), 1, id="long"),
        ('{"text": "x", "text": "y"}', 1),
        ("\n", 0),
    ],
)
def test_the_first_line_of_json_lines_called_json_may_be_blank_or_invalid(
    tmp_path: Path, first: str, line: int
) -> None:
    (tmp_path / "a.json").write_text(first + '\n{"text": "one"}\n{"text": "two"}\n')
    report = ReadingReport()
    found = list(read_documents(tmp_path / "a.json", report=report))
    assert [(document.text, document.id[-2:]) for document in found] == (
        [("one", ":2"), ("two", ":3")] if line else [("one", ":3"), ("two", ":4")]
    )
    assert [problem.line for problem in report.problems] == [1] * line


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


def test_a_sequence_of_json_texts_is_known_under_any_name(tmp_path: Path) -> None:
    """RFC 7464: a record separator precedes each text."""
    (tmp_path / "a.json-seq").write_text('\x1e{"text": "one"}\n\x1e{"text": "two"}\n')
    assert read_texts(tmp_path / "a.json-seq") == ["one", "two"]


def test_rows_with_long_texts_are_converted_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"{n} " + "ab" * 5000 for n in range(40)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=20)
    sizes = []
    read = parquet.ParquetFile.iter_batches

    def spied(table: Any, batch_size: int, **rest: Any) -> Any:
        sizes.append(batch_size)
        return read(table, batch_size, **rest)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", spied)
    assert read_texts(path) == texts
    monkeypatch.setattr(tables, "_BATCH_BYTES", 100_000)
    assert read_texts(path) == texts
    assert sizes[0] == 256
    assert 5 <= sizes[1] <= 10


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
    assert "convert it first (iconv -f latin1 -t utf-8 FILE)" in reasons[1]
    assert "is empty" in reasons[2]


SEA = "sentence {} about the sea and the ships"


@pytest.mark.parametrize(("suffix", "comma"), [("tsv", "\t"), ("csv", ","), ("csv", ";")])
@pytest.mark.parametrize("end", [12, 100, 250, 999], ids=["soon", "late", "later", "never"])
@pytest.mark.parametrize("mark", ["behind a cell", "inside a cell"])
def test_a_stray_quotation_mark_swallows_no_rows(
    tmp_path: Path, suffix: str, comma: str, end: int, mark: str
) -> None:
    """Tatoeba's sentences and GLUE are TSV in which a quotation mark is a character."""
    cells = [SEA.format(number) for number in range(300)]
    cells[10] = '"' + cells[10]
    if end < 300:
        cells[end] = cells[end] + '"' if mark == "behind a cell" else 'a "sentence" on ' + SEA
    path = tmp_path / f"a.{suffix}"
    rows = ["id" + comma + "text", *(f"{n}{comma}{cell}" for n, cell in enumerate(cells))]
    path.write_text("\n".join(rows) + "\n")
    report = ReadingReport()
    found = read_texts(path, report=report)
    if suffix == "tsv" or end > 20 or mark == "inside a cell":
        assert found == cells
        assert [(p.line, p.reason[:16]) for p in report.problems] == [(12, "a quotation mark")]
        assert report.n_repaired == 1
    else:  # two lines of prose with a comma cannot be distinguished from two rows
        assert len(found) == 298


@pytest.mark.parametrize("numbers", [(5, 7), (5, 6), (5, 30, 31)])
def test_several_stray_marks_cost_no_row(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    cells = ['"' * (n in numbers) + SEA.format(n) for n in range(300)]
    rows = [f"{cell}\t{n % 2}" for n, cell in enumerate(cells)]
    (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    assert read_texts(tmp_path / "a.tsv") == cells


@pytest.mark.parametrize("comma", ["\t", ","])
def test_quoted_cells_of_many_lines_are_read_whole(tmp_path: Path, comma: str) -> None:
    draw = random.Random(0)
    poem = "Roses are red, violets blue\nSugar is sweet, so are you"
    book = "\n".join(", ".join(["sea"] * draw.randint(1, 4)) for _ in range(400))
    rows = [["1", poem], ["2", book], ["3", 'a "word"'], ["4", "\n\n"], ["5", "end"]]
    for columns in (rows, [row[::-1] for row in rows]):
        names = ["id", "text"] if columns is rows else ["text", "id"]
        with open(tmp_path / ("a.tsv" if comma == "\t" else "a.csv"), "w", newline="") as file:
            csv.writer(file, delimiter=comma).writerows([names, *columns])
        report = ReadingReport()
        assert read_texts(Path(file.name), report=report) == [poem, book, 'a "word"', "end"]
        assert [problem.reason for problem in report.problems] == ["skipped: field 'text' is empty"]


@pytest.mark.parametrize(
    ("name", "first", "line", "n_lines"),
    [
        ("title,poem", "Oh", "Oh, my love {}", 11),
        ("id,code", "1", "total = add(total, n{})", 12),
        ("id,code", "1", "total = add(total, n{})", 60),
        ("id,lang,text", "1,sw", "walk {}, walks, walked", 8),
        ("id,text", "1", "{0},{0}\n" * 20 + "A table", 1),
        ("a,b,c,d,text", "1,2,3,4", "red, blue, green, black, {}", 3),
        ("id\ttext", "1", "def f{0}():\n\treturn {0}", 1),
    ],
)
def test_lines_of_a_valid_quoted_cell_are_no_rows(
    tmp_path: Path, name: str, first: str, line: str, n_lines: int
) -> None:
    """The text of such cells is what csv.reader gives."""
    comma = "\t" if "\t" in name else ","
    texts = ["\n".join(map(line.format, range(n_lines))), "last"]
    path = tmp_path / ("a.tsv" if comma == "\t" else "a.csv")
    with open(path, "w", newline="") as file:
        rows = [name.split(comma), *([*first.split(","), text] for text in texts)]
        csv.writer(file, delimiter=comma).writerows(rows)
    found = read_texts(path, text_field=name.split(comma)[-1], report=ReadingReport(strict=True))
    assert found == texts


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
    monkeypatch.setattr(tables, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "a.csv"
    path.write_bytes(b'text\ngood\n"never closed\n' + b"x" * 99 + b"\n" * 1200 + b"end\n")
    report = ReadingReport()
    assert read_texts(path, report=report) == ["good", "end"]
    assert [p.line for p in report.problems] == [3]
    assert "invalid CSV" in report.problems[0].reason


@pytest.mark.parametrize("columns", ["title,text", "id,text", "text,title", "text"])
@pytest.mark.parametrize("comma", [",", ";", "\t"])
@pytest.mark.parametrize("last", ["Oh, my", "Oh, my\nOh; my", "Oh, my love\nOh; my\nsea, and sky"])
def test_a_file_that_ends_inside_a_quoted_cell_loses_that_record_alone(
    tmp_path: Path, columns: str, comma: str, last: str
) -> None:
    """A table with quoted cells whose download broke off: lines of the last cell stay together."""
    names = columns.split(",")
    poems = [f'Oh, my love {i}\nred, as "roses"; blue, as ships' for i in range(20)]
    file = io.StringIO()
    rows = csv.DictWriter(file, names, delimiter=comma, extrasaction="ignore")
    rows.writeheader()
    for i, poem in enumerate(poems):
        rows.writerow({"id": i, "title": f"Poem {i}", "text": poem})
    before = {"id": f"20{comma}", "title": f"Last{comma}"}.get(names[0], "")
    cut = f'{before}"{last}'
    path = tmp_path / ("a.tsv" if comma == "\t" else "a.csv")
    path.write_text(file.getvalue() + cut, newline="")
    report = ReadingReport()
    assert read_texts(path, report=report, text_field="text") == poems
    (problem,) = report.problems
    assert problem.reason == "skipped: the file ends inside a quoted cell"
    share = float(report.facts()["skipped"].partition("1 record, ")[2].split(" %")[0])
    assert share == pytest.approx(100 * len(cut) / path.stat().st_size, rel=0.1)


@pytest.mark.parametrize(
    "kind", ["binary", "large_binary", "binary_view", "large_string", "list", "dictionary"]
)
def test_parquet_text_may_be_binary_or_a_list(tmp_path: Path, kind: str) -> None:
    """Spark, Hive and Impala write strings as binary without a type of text."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"the tale of ship {n} on a cälm sea" for n in range(600)]
    if kind == "list":
        column = pyarrow.array([[text] for text in texts])
    elif kind == "dictionary":
        column = pyarrow.array([text.encode() for text in texts]).dictionary_encode()
    else:
        column = pyarrow.array(texts).cast(getattr(pyarrow, kind)())
    url = [ADDRESS for _ in texts]
    picture = pyarrow.array([{"bytes": b"\xff", "path": "a b"} for _ in texts])
    table = pyarrow.table({"url": url, "text": column, "picture": picture})
    parquet.write_table(table, tmp_path / "a.parquet")
    report = ReadingReport(strict=True)
    assert read_texts(tmp_path / "a.parquet", report=report) == texts
    assert report.text_fields == {"a.parquet": "text"}


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("caption", "image"), {"caption"}),
        (("id", "data"), {"data"}),
        (("url", "text", "image"), {"url", "text"}),
    ],
)
def test_pictures_next_to_strings_are_not_read(
    tmp_path: Path, names: tuple[str, ...], columns: set[str]
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = {n: ["a ship"] if n in ("caption", "id", "url") else [b"a text"] for n in names}
    parquet.write_table(pyarrow.table(values), tmp_path / "a.parquet")
    with FileStream(list_files(tmp_path)[0], ReadingReport()) as stream:
        (row,) = tables.arrow_rows(stream, None)
    assert set(row.record) - {"id"} == columns


@pytest.mark.parametrize(("suffix", "compress"), PACKING)
@pytest.mark.parametrize("name", ["rows.arrow", "rows.feather", "stream"])
def test_arrow_files_and_streams_are_read(
    tmp_path: Path, name: str, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    ipc = pytest.importorskip("pyarrow").ipc
    table = pytest.importorskip("pyarrow").Table.from_pylist(ROWS * 300)
    out = io.BytesIO()
    with (ipc.new_stream if name == "stream" else ipc.new_file)(out, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / (name + suffix)).write_bytes(compress(out.getvalue()))
    found = list(read_documents(tmp_path, report=ReadingReport(strict=True)))
    assert [(d.id, d.title, d.text) for d in found] == [tuple(row.values()) for row in ROWS] * 300
    (tmp_path / (name + suffix)).write_bytes(compress(out.getvalue()[:-9000]))
    report = ReadingReport()
    assert read_texts(tmp_path, report=report) == []
    assert "the Arrow file is broken" in report.problems[0].reason
    assert report.n_partial_files == 1


def test_a_data_set_saved_by_datasets_is_its_arrow_files(tmp_path: Path) -> None:
    """The layout of `DatasetDict.save_to_disk` of datasets 4.x."""
    pyarrow = pytest.importorskip("pyarrow")
    part = tmp_path / "train"
    part.mkdir()
    table = pyarrow.table({"text": ["one", "two"]})
    with pyarrow.ipc.new_stream(part / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (part / "dataset_info.json").write_text(json.dumps({"description": "all about the sea " * 99}))
    (part / "state.json").write_text('{"_split": "the train split"}')
    (tmp_path / "state.json").write_text('{"text": "a state of the union"}')
    report = ReadingReport(strict=True)
    assert read_texts(tmp_path, report=report) == ["a state of the union", "one", "two"]
    assert report.n_skipped_files == 3


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
    path.write_text('{"post": {"body": "inner"}, "comments": [{"by": "A B"}]}', encoding="utf-8")
    assert read_texts(path, text_field="post.body") == ["inner"]
    path.write_text('[{"text": "a"}, ', encoding="utf-8")
    report = ReadingReport()
    assert read_texts(path, report=report) == []
    assert "invalid JSON" in report.problems[0].reason


def test_json_in_several_lines_names_jq(tmp_path: Path) -> None:
    """As jq 1.7 prints objects; those of a JSON text sequence (RFC 7464) in one line are read."""
    one, two = {"text": "a ship"}, {"text": "a sea"}
    pretty = "\n".join(json.dumps(each, indent=2) for each in (one, two))
    for name, text in (
        ("a.json", pretty),
        ("a.jsonl", pretty),
        ("a.json", json.dumps(one) + json.dumps(two)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        report = ReadingReport()
        assert read_texts(tmp_path / name, report=report) == []
        assert "jq -c . FILE" in report.problems[0].reason
    for name in ("a.json", "a.jsonl"):
        sequence = "".join(f"\x1e{json.dumps(each)}\n" for each in (one, two))
        (tmp_path / name).write_text(sequence, encoding="utf-8")
        assert read_texts(tmp_path / name) == ["a ship", "a sea"]
    (tmp_path / "a.json").write_text("\x1e" + pretty.replace("\n{", "\n\x1e{"), encoding="utf-8")
    report = ReadingReport()
    assert read_texts(tmp_path / "a.json", report=report) == []
    assert "jq --seq -c . FILE" in report.problems[0].reason


@pytest.mark.parametrize("mark", ["sep=;", '"sep=^"', "sep=\t"])
def test_the_delimiter_line_of_excel_is_no_header(tmp_path: Path, mark: str) -> None:
    delimiter = mark.strip('"').removeprefix("sep=")
    rows = [["id", "text"], ["1", "a ship, a sea"]]
    text = "\r\n".join([mark, *map(delimiter.join, rows)])
    (tmp_path / "a.csv").write_bytes(text.encode())
    (document,) = read_documents(tmp_path / "a.csv")
    assert (document.id, document.text) == ("1", "a ship, a sea")


def test_a_first_line_that_looks_like_a_record_is_a_warning(tmp_path: Path) -> None:
    for text, is_warned in (
        ("0,a ship\n1,a sea\n", True),
        ("a ship " * 20 + ",yes\na sea,no\n", True),
        ("country,1960,1961\na sea,1,2\n", False),
    ):
        (tmp_path / "a.csv").write_text(text, encoding="utf-8")
        report = ReadingReport()
        assert len(read_texts(tmp_path / "a.csv", report=report)) == 1
        facts = report.facts()
        assert ("looks like a record" in facts.get("warning", "")) == is_warned
        assert "as it is" not in facts
