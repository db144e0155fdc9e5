"""Files of all kinds: each is read, or named for what it is, with its share of the bytes."""

from __future__ import annotations

import io
import pickle
import re
import sys
import zipfile
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
    odt,
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
        "From: Anna\nTo: Ben\n\nYour Message-ID: <1@a> came.\n",
        "<p>A list of <b>ships</b></p>\n",
        "A paper begins with %PDF-1.4, an archive with PK.\n",
        'abcdefgh{"a": 1} is not a model\n',
        "% a sign\nof its own\n",
        "RIFF, ORC, GIF and Obj\n",
        *[
            f"{mark} is how a file begins, and has a meaning.\n"
            for mark in [
                *["PAR1", "WARC/1.0", "%PDF-1.4", "From", "LZIP", "MSCF", "!<arch>", "xar!"],
                *["{\\rtf1", "AT&TFORM", "%!PS", "%!PS-Adobe-3.0", "FEA1", "ORC", "Obj", "GGUF"],
                *["version https://git-lfs.github.com/spec/v1", "SQLite format 3", "GIF89a"],
                *["RIFFabcdWEBP", "RIFFabcdWAVE", "8BPS", "fLaC", "OggS", "ID3", "MZ", "OTTO"],
                *["wOFF", "wOF2", "filedesc://a.arc", "The ftyp", "The ftypavif", "WEBVTT", "BM"],
            ]
        ],
        "OTTO VON BISMARCK was a statesman.\n",
        "Vanity Fair\np1\nA novel.\n",
        "(Some sail,\nothers row.)\n",
        "cats\ndogs\np1\n(a list)\n",
        "(d) ships\n(e) boats\n",
        "]q is a sign, }q another.\n",
        "begin 644 days of rain\nand no ship.\n",
        "-----BEGIN-----\nThe ship sails.\n",
        "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nThe ship sails.\n",
        "WEBVTT is a format.\nAnother line.\n\nA 00:01 --> B.\n",
        "a" * 256 + " ustar\n" + "b" * 59 + "\n",
        "a" * 257 + "ustar, the mark of tar\n",
        "a" * 60 + "BOOKMOBI is a mark\n",
        "From the BBC, Mon Jan 10 10:10:10 2020 by a reporter\nLondon: a ship.\n",
    ],
)
def test_prose_that_begins_like_another_kind_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    report = ReadingReport()
    assert read_texts(tmp_path / "a.txt", report=report) == [text]
    assert not report.omitted


@pytest.mark.parametrize("mark", ["OTTO", "GGUF", "FEA1"])
def test_a_table_that_begins_like_another_kind_is_a_table(tmp_path: Path, mark: str) -> None:
    (tmp_path / "a.csv").write_text(f"{mark},text\n1,The ship sails.\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.csv") == ["The ship sails."]


@pytest.mark.parametrize("name", ["Tatoeba.br-en.br", "notes.lzma"])
def test_text_in_breton_is_not_packed_by_brotli(tmp_path: Path, name: str) -> None:
    """The sides of a pair of OPUS are called by their languages."""
    (tmp_path / name).write_text("Ar vag a ya e\u00f1voret.\n", encoding="utf-8")
    assert read_texts(tmp_path / name) == ["Ar vag a ya e\u00f1voret.\n"]
    (tmp_path / name).write_bytes(b"\x1b\x11\x00\xf8\x8d\xd4\x6e\x1e\x9c")
    with pytest.raises(ValueError, match="packed by brotli or lzma; unpack it"):
        read_texts(tmp_path / name)


@pytest.mark.parametrize(
    ("start", "format"),
    [
        (b"From joe at example.org  Mon Jan 10 10:10:10 2020\nSubject: a\n", "mail"),
        (b"From - Mon Jan 10 10:10:10 2020\nX-Status: a\n", "mail"),
        (b"WEBVTT - a film\nKind: captions\n\n1\n00:01.000 --> 00:02.000\nA ship.\n", "subtitles"),
        (b"WEBVTT\r\n\r\n00:01.000 --> 00:02.000\r\nA ship.\r\n", "subtitles"),
        (b"%PDF-1.7 %\xe2\xe3\n1 0 obj\n", "pdf"),
        (b"%PDF-1.4\r%\xe2\xe3\r1 0 obj\r", "pdf"),
        (b"WARC/1.1\nWARC-Type: warcinfo\n", "warc"),
    ],
)
def test_spellings_of_a_kind_are_known(start: bytes, format: str) -> None:
    assert format_of(start, "a")[0] == format


class Ship:
    """Pickled by the name of its class."""

    sails = 3


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_all_protocols_are_skipped_under_any_name(protocol: int) -> None:
    """Protocol 0 is letters (Python's pickletools, "What's in a pickle"), and no text."""
    texts = [f"The ship sails {i}." for i in range(3)]
    ship = Ship()
    ship.__dict__["texts"] = texts
    containers = [{"text": texts[0]}, texts, [texts], [], {}, ship, [ship], set(texts), Ship]
    values = [texts[0], tuple(texts), (1, texts[0]), (None, 2.5), ((texts[0],), -1)]
    for content in containers + values:
        head = pickle.dumps(content, protocol)
        format, note = format_of(head, "notes.txt")
        assert format is None
        # Letters are all that hides a pickle: a value of protocol 1 has a NUL byte.
        assert "a pickle" in note or (protocol == 1 and note.startswith("binary")), content


@pytest.mark.parametrize(
    "start",
    [
        "begin-base64 644 ship.bin\n" + "QUJD" * 19 + "\nQUJD\n====\n",
        "=ybegin line=128 size=9 name=ship.bin\nabc\n",
        "(This file must be converted with BinHex 4.0)\n\n:abc:\n",
        "-----BEGIN CERTIFICATE-----\n" + "QUJD" * 16 + "\nQUJD\n",
        "-----BEGIN PGP MESSAGE-----\nVersion: 1\n\n" + "QUJD" * 16 + "\nQUJD\n",
    ],
)
def test_bytes_that_are_written_as_letters_are_no_text(start: str) -> None:
    format, note = format_of(start.encode(), "letters.dat")
    assert format is None
    assert "decode it" in note


def test_marks_within_subtitles_are_left_out(tmp_path: Path) -> None:
    """The captions of YouTube have a head of three lines, and the time of each word."""
    head = "WEBVTT\nKind: captions\nLanguage: en\n\n"
    cue = "00:01.000 --> 00:02.000 align:start\nA<00:00:01.320><c> ship</c>, a < b.\n"
    (tmp_path / "a.vtt").write_text(head + cue + "\n" + cue.replace("A<", "<v Anna>A<"))
    (tmp_path / "b.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\n<i>A <b>ship</b>.</i>\n")
    one, two = read_texts(tmp_path)
    assert one.split("\n") == ["", "A ship, a < b.", "", "A ship, a < b.", ""]
    assert two == "A ship.\n"


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


def test_notes_of_word_follow_its_text(tmp_path: Path) -> None:
    names = "xmlns:w='http://schemas.openxmlformats.org/wordprocessingml/2006/main'"
    note = "<w:p><w:r><w:t>{}</w:t></w:r></w:p>"
    parts = {
        "word/document.xml": f"<w:document {names}>{note.format('One.')}</w:document>",
        "word/footnotes.xml": f"<w:footnotes {names}>{note.format('Two.')}</w:footnotes>",
        "word/endnotes.xml": f"<w:endnotes {names}><w:p/></w:endnotes>",
    }
    (tmp_path / "a.docx").write_bytes(zip_of(parts))
    assert read_texts(tmp_path / "a.docx") == ["One.\nTwo."]


def test_a_box_of_word_is_read_once_after_its_paragraph(tmp_path: Path) -> None:
    """Word 2010 writes a text box twice: as Choice, and as Fallback for older programs."""
    box = docx("Boxed.</w:t></w:r></w:p><w:p><w:r><w:t>Second.")
    with zipfile.ZipFile(io.BytesIO(box)) as archive:
        xml = archive.read("word/document.xml").decode()
    start, stop = xml.index("<w:p>"), xml.index("</w:body>")
    inner = xml[start:stop]
    compatible = "xmlns:mc='http://schemas.openxmlformats.org/markup-compatibility/2006'"
    both = f"<mc:Choice>{inner}</mc:Choice><mc:Fallback>{inner}</mc:Fallback>"
    box_xml = f"<w:r><mc:AlternateContent {compatible}>{both}</mc:AlternateContent></w:r>"
    tabs = (
        "<w:pPr><w:tabs><w:tab/></w:tabs></w:pPr><w:moveFrom><w:r><w:t>x</w:t></w:r></w:moveFrom>"
    )
    end = "<w:r><w:tab/><w:t>after.</w:t><w:br/></w:r>"
    before = "<w:r><w:t>Before,</w:t></w:r>"
    outer = f"<w:p>{tabs}{before}{box_xml}{end}</w:p>"
    xml = xml[:start] + outer + xml[stop:]
    (tmp_path / "a.docx").write_bytes(zip_of({"word/document.xml": xml}))
    assert read_texts(tmp_path / "a.docx") == ["Before,\tafter.\n\nBoxed.\nSecond."]


def test_text_grows_with_the_file_where_paragraphs_are_nested(tmp_path: Path) -> None:
    """Ten levels around one word: it was there ten times."""
    (tmp_path / "a.odt").write_bytes(odt("<t:p>" * 9 + "word" + "</t:p>" * 9))
    (text,) = read_texts(tmp_path / "a.odt")
    assert text.split() == ["word"]


def test_deleted_words_notes_and_spaces_of_opendocument(tmp_path: Path) -> None:
    """Signs of OpenDocument 1.3, 6.1: text:s with its number, text:tab, text:line-break."""
    deleted = (
        "x</t:p><t:tracked-changes><t:changed-region><t:deletion><t:p>deleted</t:p></t:deletion>"
        "</t:changed-region></t:tracked-changes><t:p>"
    )
    note = "<t:note><t:note-body><t:p>A <t:span>note</t:span>.</t:p></t:note-body></t:note>"
    line = f"A<t:s/>ship{note} sails<t:tab/>to<t:line-break/>the<t:s t:c='3'/>sea."
    (tmp_path / "a.odt").write_bytes(odt(deleted + line))
    assert read_texts(tmp_path / "a.odt") == ["x\nA ship sails\tto\nthe   sea.\nA note."]


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


@pytest.mark.parametrize("charset", ["x-unknown", "iso-8859-8-i-x"])
def test_a_mail_of_an_unknown_charset_is_read_as_utf_8(tmp_path: Path, charset: str) -> None:
    (tmp_path / "a.eml").write_text(
        f"Subject: a\nContent-Type: text/plain; charset={charset}\n\nThe ship sails \u2013 now.\n",
        encoding="utf-8",
    )
    report = ReadingReport()
    assert read_texts(tmp_path / "a.eml", report=report) == ["The ship sails \u2013 now.\n"]
    assert not report.omitted


def test_a_dump_with_a_bad_character_is_read_up_to_there(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    rows = "".join(f'<row Id="{n}" Text="A ship, {n}." />\n' for n in (1, 2))
    (tmp_path / "so.xml").write_text(f"<comments>\n{rows}<row Text='a & b' />\n</comments>\n")
    report = ReadingReport()
    assert read_texts(tmp_path / "so.xml", report=report) == ["A ship, 1.", "A ship, 2."]
    (problem,) = report.problems
    assert "a Stack Exchange dump; it cannot be read: ParseError" in problem.reason
    assert "bytes before that were read" in problem.reason
    (tmp_path / "so.xml").write_text("<comments>\n<row Text='a & b' />\n</comments>\n")
    with pytest.raises(ValueError, match="it cannot be read: ParseError"):
        read_texts(tmp_path / "so.xml")


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
