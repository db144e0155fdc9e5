"""Text files that hold several documents, and books with the notices of Project Gutenberg."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corpus_files import read_texts
from pretrain.cli import main
from pretrain.corpus import reading
from pretrain.corpus.documents import ReadingReport
from pretrain.corpus.reading import read_documents
from pretrain.data.preparation import prepare

STORIES = ["One story.\n\nIts end.", "Two.", "Thr\u00e9e.", "Four."]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("between", ["\n<|endoftext|>\n", "<|endoftext|>", "\r\n<|endoftext|>\n\n"])
def test_a_separator_divides_a_text_file(tmp_path: Path, between: str, encoding: str) -> None:
    """As TinyStoriesV2 and GPT-2's own samples are written."""
    path = tmp_path / "a.txt"
    content = between + between.join(STORIES) + between * 2
    path.write_bytes(content.encode(encoding))
    report = ReadingReport(document_separator="<|endoftext|>")
    found = list(read_documents(path, report=report))
    assert [document.text for document in found] == STORIES
    assert [document.id for document in found] == ["a.txt", "a.txt#2", "a.txt#3", "a.txt#4"]
    assert not report.problems
    assert not report.omitted
    if encoding == "utf-8":
        for document in found[1:]:
            assert path.read_bytes()[document.offset :].startswith(document.text.encode())


def test_a_separator_of_several_lines_divides_a_file_with_other_line_ends(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a.txt").write_bytes(f"one{end}---{end}two{end}---{end}three".encode())
        report = ReadingReport(document_separator="\n---\n")
        assert read_texts(tmp_path, report=report) == ["one", "two", "three"]


def test_no_document_is_cut_where_a_long_file_is_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 1000)
    texts = [f"{number} " + "word " * (number % 90) + "end" for number in range(300)]
    (tmp_path / "a.txt").write_text("\n\n\n".join(texts), encoding="utf-8")
    report = ReadingReport(document_separator="\n\n\n")
    assert read_texts(tmp_path / "a.txt", report=report) == texts


def test_marks_are_counted_where_nobody_named_a_separator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "stories.txt"
    texts = [f"Story {n} of a ship that sails to Bergen." for n in range(60)]
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    words = ["prepare", str(path), "--tokenizer", "bytes", "--out"]
    assert main([*words, str(tmp_path / "p")]) == 0
    advice = "--data.document_separator '<|endoftext|>'"
    expected = f"59 marks: <|endoftext|> as letters; if it divides documents: {advice} (stories.txt"
    assert expected in capsys.readouterr().out
    assert main([*words, str(tmp_path / "q"), "--document-separator", "<|endoftext|>"]) == 0
    assert "as letters" not in capsys.readouterr().out
    assert json.loads((tmp_path / "q" / "report.json").read_text())["n_kept_documents"] == 60
    manifests = [json.loads((tmp_path / out / "manifest.json").read_text()) for out in "pq"]
    first, second = (manifest["settings"] for manifest in manifests)
    assert "document_separator" not in first
    assert second["document_separator"] == "<|endoftext|>"
    assert prepare(path, tmp_path / "r", tokenizer="bytes").split("train").n_tokens > 0


HEAD = "The Project Gutenberg eBook of {0}\n\nThis ebook is for the use of anyone.\n\n"
START = "*** START OF THE PROJECT GUTENBERG EBOOK {0} ***\n\n"
END = "\n\n*** END OF THE PROJECT GUTENBERG EBOOK {0} ***\n\nUpdated editions will replace it.\n"
OLD_START = "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n"
OLD_END = "\nEnd of Project Gutenberg's Ships\nDonations are welcome.\n"
BOOK = "CHAPTER I\n\nThe ship sails to Bergen.\n"


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (START.format("SHIPS"), END.format("SHIPS")),
        (START.replace("THE PROJECT", "THIS PROJECT").format("A LONG\nTITLE"), END.format("A")),
        (OLD_START, OLD_END),
        (START.format("SHIPS"), ""),
        (START.format("A"), "\nEnd of the Project Gutenberg EBook of Ships" + END.format("A")),
    ],
)
def test_notices_of_project_gutenberg_are_left_out(tmp_path: Path, start: str, end: str) -> None:
    head = HEAD.format("Ships")
    (tmp_path / "a.txt").write_text(head + start + BOOK + end, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": head + start + BOOK + end}) + "\n")
    report = ReadingReport()
    assert read_texts(tmp_path, report=report) == [BOOK, BOOK]
    assert "2 books, " in report.facts()["skipped"]
    assert (
        "of the bytes: notices of Project Gutenberg (a.txt, b.jsonl)" in report.facts()["skipped"]
    )


def test_notices_of_long_licences_and_texts_that_quote_one(tmp_path: Path) -> None:
    """The text of book 1342 has its last notice indented; a licence has about 70 mentions."""
    licence = "Section 1. Terms of Use of Project Gutenberg electronic works.\n" * 70
    one = HEAD.format("Ships") + START.format("SHIPS") + BOOK
    one += "\n" + " " * 12 + END.lstrip().format("SHIPS") + licence
    (tmp_path / "a.txt").write_text(one * 3, encoding="utf-8")
    (text,) = read_texts(tmp_path / "a.txt")
    assert text.split() == BOOK.split() * 3
    for quoted in (
        "Notes.\nEnd of Project Gutenberg support in our reader.\nNow the rest.\n",
        "A book ends with this line:" + END[:60] + "\n" + "Then our notes follow. " * 20 + "\n",
        "# Cleaning\n```" + OLD_END[:40] + "```\n" + "Take it out. " * 20 + "\n",
        "Books of Project Gutenberg begin with:\n"
        + START.format("X")
        + "It ends"
        + END.format("X"),
    ):
        (tmp_path / "a.txt").write_text(quoted, encoding="utf-8")
        assert read_texts(tmp_path / "a.txt") == [quoted]


def test_several_books_in_one_file_and_texts_about_project_gutenberg(tmp_path: Path) -> None:
    one = HEAD.format("Ships") + START.format("SHIPS") + BOOK + END.format("SHIPS")
    (tmp_path / "a.txt").write_text(one * 2, encoding="utf-8")
    (text,) = read_texts(tmp_path / "a.txt")
    assert text.split() == [*BOOK.split(), *BOOK.split()]
    about = (
        "I read Project Gutenberg.\n" + "word " * 20000 + "\n" + START.format("X") + "It ends.\n"
    )
    (tmp_path / "a.txt").write_text(about, encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == [about]
