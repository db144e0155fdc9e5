"""Files of all kinds: each is read, or named for what it is, with its share of the bytes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from corpus_files import read_texts
from odd_files import (
    AS_WRITTEN,
    MEDIAWIKI,
    READ,
    SAVED_PAGE,
    SENTENCE,
    SKIPPED,
    docx,
    epub,
    pdf,
    write_odd_folder,
    zip_of,
)
from pretrain.corpus import publications
from pretrain.corpus.documents import ReadingReport
from pretrain.corpus.files import format_of
from pretrain.corpus.reading import read_documents


def test_each_of_many_kinds_is_read_or_named(tmp_path: Path) -> None:
    for package in ("pyarrow", "resiliparse", "fastwarc"):
        pytest.importorskip(package)
    write_odd_folder(tmp_path / "odd")
    report = ReadingReport()
    found = {document.source for document in read_documents(tmp_path / "odd", report=report)}
    assert found == {*READ, *AS_WRITTEN}
    facts = report.facts()
    for name in AS_WRITTEN:
        assert name in facts["as it is"]
    lines = facts["skipped"].split("\n")
    for name, (reason, make) in SKIPPED.items():
        (line,) = (line for line in lines if name in line.rpartition("(")[2].strip(")").split(", "))
        assert reason in line
        assert " of the bytes: " in line or not make()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "odd").iterdir()}
    n_whole = sum(sizes[name] for name in [*SKIPPED, "rows.sqlite"])
    n_records = sum(each.n_bytes for each in report.omitted.values() if each.unit not in ("file",))
    n_omitted = sum(each.n_bytes for each in report.omitted.values() if not each.is_read)
    assert n_whole <= n_omitted <= n_whole + n_records + sizes["work.ipynb"]
    assert report.n_read_bytes == sum(sizes.values())


@pytest.mark.parametrize(
    "text",
    [
        "From here at 10:30 to the sea\nNote: a ship\n",
        "# text about ships\n",
        "BM is a name, II* too, and MM\n",
        "ID3 and MZ and OggS\n",
        "1\n2\n3\n",
        "Subject: a poem\n\nThe ship sails.\n",
        "A paper begins with %PDF-1.4, an archive with PK.\n",
        'abcdefgh{"a": 1} is not a model\n',
        "% a sign\nof its own\n",
        "RIFF, ORC, GIF and Obj\n",
    ],
)
def test_prose_that_begins_like_another_kind_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    report = ReadingReport()
    assert read_texts(tmp_path / "a.txt", report=report) == [text]
    assert not report.omitted


def test_many_comments_before_no_page_are_text(tmp_path: Path) -> None:
    """The time to tell a page from text doubled with each comment."""
    text = "<!-- a comment -->\n" * 200 + "The ship sails.\n"
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    assert read_texts(tmp_path / "a.md") == [text]


def test_a_book_is_its_chapters_in_the_order_of_its_spine(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    (tmp_path / "a.epub").write_bytes(
        epub({"z": "The first.", "a": "The second.", "m": "The third."})
    )
    (document,) = read_documents(tmp_path / "a.epub")
    assert document.text == "The first.\n\nThe second.\n\nThe third."
    assert (document.id, document.title) == ("a.epub", "Ships")


def test_deleted_words_and_commands_of_word_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(docx("One.", "Two."))
    assert read_texts(tmp_path / "a.docx") == ["One.\nTwo."]


def test_messages_are_decoded_and_divided(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    page = "<html><body><p>The ship sails to Bergen.</p></body></html>"
    box = (
        "From a@example.org Mon Jan  1 00:00:00 2024\nSubject: =?utf-8?q?H=C3=A4fen?=\n"
        "Content-Type: text/plain; charset=latin-1\nContent-Transfer-Encoding: 8bit\n\n"
        "caf\xe9\nFrom inside a paragraph\n\n"
        "From b@example.org Tue Jan  2 00:00:00 2024\n"
        f"Content-Type: text/html; charset=utf-8\n\n{page}\n\n"
        "From c@example.org Wed Jan  3 00:00:00 2024\nContent-Type: image/png\n\nxx\n"
    )
    (tmp_path / "a").write_bytes(box.encode("latin-1"))
    report = ReadingReport()
    first, second = read_documents(tmp_path / "a", report=report)
    assert first.text.strip() == "caf\xe9\nFrom inside a paragraph"
    assert first.title == "H\xe4fen"
    assert second.text == "The ship sails to Bergen."
    assert "1 document: without text" in report.facts()["skipped"]


@pytest.mark.parametrize("code", ["UTF-16le", "UTF-16be", "UTF-32le", "UTF-32be"])
def test_wide_text_without_its_mark_is_named_by_its_code(code: str) -> None:
    assert f"iconv -f {code} " in format_of(SENTENCE.encode(code), "a.txt")[1]


def test_a_saved_page_is_read_in_its_own_encoding(tmp_path: Path) -> None:
    """Chrome's MHTML; `From` at the start of a line divides mailboxes only."""
    pytest.importorskip("resiliparse")
    (tmp_path / "a.mht").write_bytes(SAVED_PAGE.encode())
    (document,) = read_documents(tmp_path / "a.mht")
    expected = "From H\xe4fen, Geb\xe4ude, Gew\xe4sser, gr\xf6\xdfere Fl\xfcsse."
    assert (document.title, document.text) == ("Ships", expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"data": {"text": "The ship sails."}}'),
        ("a.json", '{"text": "train", "train": {"steps": 9}}'),
        ("a.toml", '[model]\nname = "ship"\n'),
        ("a.toml", "[ship]\nsteps = 9\n\n[train]\nsteps = 9\n"),
    ],
)
def test_settings_of_others_are_no_config(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    report = ReadingReport()
    list(read_documents(tmp_path, report=report))
    assert report.n_skipped_files == 0


def test_a_dump_of_mediawiki_gives_its_articles_as_plain_text(tmp_path: Path) -> None:
    """Of mwparserfromhell 0.7: links become their words, templates nothing."""
    pytest.importorskip("mwparserfromhell")
    (tmp_path / "dump.xml").write_text(MEDIAWIKI, encoding="utf-8")
    report = ReadingReport()
    (document,) = read_documents(tmp_path / "dump.xml", report=report)
    assert document.text == "A large boat sails & floats."
    assert document.title == "Ship"
    assert "2 pages, " in report.facts()["skipped"]


def test_a_paper_is_the_text_of_its_pages(tmp_path: Path) -> None:
    """A PDF in letters only, as reportlab 5.1 writes them: no NUL byte tells it from text."""
    pytest.importorskip("pypdf")
    content = pdf(SENTENCE)
    assert b"\0" not in content
    (tmp_path / "a.pdf").write_bytes(content)
    (tmp_path / "b").write_bytes(b"junk of a mail\n" + content)
    assert read_texts(tmp_path / "a.pdf") == [SENTENCE]
    (tmp_path / "b").rename(tmp_path / "b.pdf")
    assert read_texts(tmp_path / "b.pdf") == [SENTENCE]
    (tmp_path / "empty.pdf").write_bytes(pdf(""))
    (tmp_path / "cut.pdf").write_bytes(content[:200])
    (tmp_path / "locked.pdf").write_bytes(content.replace(b"/Root", b"/Encrypt 9 0 R/Root"))
    report = ReadingReport()
    assert read_texts(tmp_path, report=report) == [SENTENCE, SENTENCE]
    assert {problem.file for problem in report.problems} >= {"cut.pdf", "locked.pdf"}
    assert "without text: pictures only, or empty (empty.pdf)" in report.facts()["skipped"]


def test_a_missing_package_is_named_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    (tmp_path / "a.pdf").write_bytes(pdf(SENTENCE))
    (tmp_path / "b.txt").write_text("The ship.\n", encoding="utf-8")
    report = ReadingReport()
    assert read_texts(tmp_path, report=report) == ["The ship.\n"]
    expected = r"a PDF document; it needs the package pypdf: .*\[documents\]"
    assert re.search(expected, report.facts()["skipped"])
    with pytest.raises(ValueError, match=expected):
        read_texts(tmp_path / "a.pdf")


def test_archives_that_grow_or_declare_entities_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.docx"
    path.write_bytes(zip_of({"word/document.xml": "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>"}))
    with pytest.raises(ValueError, match="declares entities"):
        read_texts(path)
    path.write_bytes(docx("a" * 5000))
    monkeypatch.setattr(publications, "MAX_PART_BYTES", 4000)
    with pytest.raises(ValueError, match=r"word/document\.xml is too large"):
        read_texts(path)
    monkeypatch.setattr(publications, "MAX_FILE_BYTES", 4500)
    with pytest.raises(ValueError, match="more than 4,500 bytes when it is unpacked"):
        read_texts(path)
    path.write_bytes(zip_of({"META-INF/container.xml": "<x/>", "META-INF/rights.xml": "<x/>"}))
    with pytest.raises(ValueError, match=r"locked \(DRM\)"):
        read_texts(path)
    path.write_bytes(docx("")[:-40])
    with pytest.raises(ValueError, match="a zip archive; it cannot be read: BadZipFile"):
        read_texts(path)
