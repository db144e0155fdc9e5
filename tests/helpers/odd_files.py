"""A folder of many kinds of files, as people have them: each small, valid and built here."""

from __future__ import annotations

import base64
import binascii
import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import wave
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from corpus_files import FORMATS, PAGE, as_warc

SENTENCE = "The ship sails to Bergen when the ice has gone."


def zip_of(parts: Mapping[str, str]) -> bytes:
    """A zip archive of texts by name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
    return out.getvalue()


def epub(chapters: Mapping[str, str]) -> bytes:
    """A book of XHTML chapters, of which the manifest has another order than the spine."""
    page = "<html xmlns='http://www.w3.org/1999/xhtml'><head/><body>{}</body></html>"
    items = "".join(f'<item id="{n}" href="{n}.xhtml"/>' for n in sorted(chapters, reverse=True))
    spine = "".join(f'<itemref idref="{n}"/>' for n in chapters)
    return zip_of(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": "<container xmlns='urn:oasis:names:tc:opendocument:x'>"
            "<rootfiles><rootfile full-path='OEBPS/book.opf'/></rootfiles></container>",
            "OEBPS/book.opf": "<package xmlns='http://www.idpf.org/2007/opf' "
            "xmlns:dc='http://purl.org/dc/elements/1.1/'><metadata><dc:title>Ships</dc:title></metadata>"
            f"<manifest>{items}</manifest><spine>{spine}</spine></package>",
            **{
                f"OEBPS/{name}.xhtml": page.format(f"<p>{text}</p>")
                for name, text in chapters.items()
            },
        }
    )


_W = "xmlns:w='http://schemas.openxmlformats.org/wordprocessingml/2006/main'"


def docx(*paragraphs: str) -> bytes:
    """A document of Word, with a deleted word and a command that are not its text."""
    rest = "<w:del><w:r><w:delText>deleted</w:delText></w:r></w:del><w:instrText>PAGE</w:instrText>"
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r>{rest}</w:p>" for text in paragraphs)
    xml = f"<w:document {_W}><w:body>{body}</w:body></w:document>"
    return zip_of({"[Content_Types].xml": "<Types/>", "word/document.xml": xml})


def odt(*paragraphs: str) -> bytes:
    """A document of OpenOffice."""
    names = "xmlns:o='urn:oasis:names:tc:opendocument:xmlns:office:1.0' "
    names += "xmlns:t='urn:oasis:names:tc:opendocument:xmlns:text:1.0'"
    body = "".join(f"<t:p>{text}</t:p>" for text in paragraphs)
    kind = "application/vnd.oasis.opendocument.text"
    xml = f"<o:document-content {names}><o:body>{body}</o:body></o:document-content>"
    return zip_of({"mimetype": kind, "content.xml": xml})


def pdf(text: str) -> bytes:
    """A page of text, in letters only."""
    content = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET"
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R"
        "/Resources<</Font<</F1 5 0 R>>>>>>",
        f"<</Length {len(content)}>>\nstream\n{content}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, offsets = "%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    tail = f"xref\n0 6\n0000000000 65535 f \n{table}trailer\n<</Size 6/Root 1 0 R>>\n"
    return f"{out}{tail}startxref\n{len(out)}\n%%EOF\n".encode()


def mailbox(*texts: str) -> bytes:
    """A mailbox, its bodies in base64."""
    messages = [
        f"From a@example.org Mon Jan  1 00:00:0{n} 2024\nSubject: Mail {n}\nMIME-Version: 1.0\n"
        "Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: base64\n\n"
        f"{base64.encodebytes(text.encode()).decode()}\n"
        for n, text in enumerate(texts)
    ]
    return "".join(messages).encode()


MEDIAWIKI = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11">
  <siteinfo><sitename>W</sitename></siteinfo>
  <page><title>Ship</title><ns>0</ns><id>1</id><revision><id>9</id>
    <text>A '''[[ship|large boat]]'''{{citation|x}} sails &amp;amp; floats.</text></revision></page>
  <page><title>Boat</title><ns>0</ns><redirect title="Ship"/>
    <revision><text>#REDIRECT [[Ship]]</text></revision></page>
  <page><title>Talk:Ship</title><ns>1</ns><revision><text>Talk.</text></revision></page>
</mediawiki>
"""
POSTS = (
    '<?xml version="1.0" encoding="utf-8"?>\n<posts>\n  <row Id="1" Title="Ships" '
    'Body="&lt;p&gt;How do ships sail? It is the wind that moves a ship.&lt;/p&gt;" />\n</posts>\n'
)
NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "metadata": {}, "source": ["# Ships\n", "They sail."]},
        {
            "cell_type": "code",
            "metadata": {},
            "source": "print(1)",
            "outputs": [{"data": {"image/png": "iVBOR" * 99}}],
        },
    ],
    "metadata": {},
    "nbformat": 4,
    "nbformat_minor": 5,
}
# As Chrome saves a page: the part names no charset, the page does.
SAVED_PAGE = (
    "From: <Saved by Blink>\r\nSubject: Ships\r\nMIME-Version: 1.0\r\nContent-Type: "
    'multipart/related; type="text/html"; boundary="b"\r\n\r\n--b\r\nContent-Type: text/html\r\n'
    'Content-Transfer-Encoding: quoted-printable\r\n\r\n<html><head><meta charset=3D"utf-8">'
    "</head><body>\r\n\r\nFrom H=C3=A4fen, Geb=C3=A4ude, Gew=C3=A4sser, gr=C3=B6=C3=9Fere "
    "Fl=C3=BCsse.</body></html>\r\n--b--\r\n"
)
SUBTITLES = (
    "1\n00:00:01,000 --> 00:00:02,000\nA ship.\n\n2\n00:00:03,000 --> 00:00:04,500\nIt sails.\n"
)


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(SENTENCE)
        archive.addfile(info, io.BytesIO(SENTENCE.encode()))
    return out.getvalue()


def _npy() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(9))
    return out.getvalue()


def _uuencoded() -> bytes:
    lines = [binascii.b2a_uu(bytes(range(start, start + 45))) for start in (0, 45, 90)]
    return b"begin 644 ship.bin\n" + b"".join(lines) + b"`\nend\n"


def _wav() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(b"\0" * 99)
    return out.getvalue()


def _sqlite(folder: Path) -> bytes:
    path = folder / "database"
    with sqlite3.connect(path) as database:
        database.execute("create table t (text)")
    database.close()
    content = path.read_bytes()
    path.unlink()
    return content


_SAFETENSORS = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
READ: dict[str, Callable[[], bytes]] = {
    **{f"{number}-{name}": make for number, (name, make) in enumerate(FORMATS.items())},
    "page.html": PAGE.encode,
    "crawl.warc": as_warc,
    "plain.txt": SENTENCE.encode,
    "wide.txt": lambda: SENTENCE.encode("utf-16"),
    "packed.txt.gz": lambda: gzip.compress(SENTENCE.encode()),
    "packed.txt.bz2": lambda: bz2.compress(SENTENCE.encode()),
    "packed.txt.xz": lambda: lzma.compress(SENTENCE.encode()),
    "notes.md": lambda: f"# Ships\n\n{SENTENCE}\n".encode(),
    "code.py": lambda: b"print('ship')\n",
    "settings.yaml": lambda: b"ship: Anna\n",
    "settings.ini": lambda: b"[ship]\nname = Anna\n",
    "server.log": lambda: b"2024-01-01 00:00:00 INFO the ship sails\n",
    "book.epub": lambda: epub({"one": SENTENCE, "two": "The second chapter."}),
    "letter.docx": lambda: docx(SENTENCE, "Second."),
    "letter.odt": lambda: odt(SENTENCE, "Second."),
    "list.mbox": lambda: mailbox(SENTENCE, "Second."),
    "packed.mbox.gz": lambda: gzip.compress(mailbox(SENTENCE)),
    "one.eml": lambda: b"Subject: Ships\nTo: b@example.org\n\nThe ship sails.\n",
    "1700000000.M1P1.host:2,S": lambda: (
        b"Return-Path: <a@example.org>\nFrom: a@example.org\nMessage-ID:\n <1@example.org>\n\n"
        b"A ship.\n"
    ),
    "saved.mhtml": SAVED_PAGE.encode,
    "film.srt": SUBTITLES.encode,
    "film.vtt": lambda: b"WEBVTT\n\n00:01.000 --> 00:02.000\nA ship.\n",
    "work.ipynb": lambda: json.dumps(NOTEBOOK).encode(),
    "Posts.xml": POSTS.encode,
}
"""Files that are read, by name."""
AS_WRITTEN: dict[str, Callable[[], bytes]] = {
    "paper.tex": lambda: rb"\documentclass{article}\begin{document}A ship.\end{document}",
    "edition.xml": lambda: b'<TEI xmlns="http://www.tei-c.org/ns/1.0"><text>A ship.</text></TEI>\n',
    "memory.tmx": lambda: b'<?xml version="1.0"?>\n<tmx version="1.4"><body/></tmx>\n',
    "feed.xml": lambda: b'<?xml version="1.0"?>\n<rss><title>A ship</title></rss>\n',
    "drawing.svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><text>A ship</text></svg>\n',
    "article.nxml": lambda: b'<article xml:lang="en"><p>A ship.</p></article>\n',
    "article": lambda: b'<!DOCTYPE article PUBLIC "JATS" "a.dtd">\n<article>A ship.</article>\n',
    "wiki_00": lambda: (
        b'<doc id="1" url="https://a/wiki?curid=1" title="A "ship"">\nA ship.\n</doc>\n'
    ),
    "tweets.js": lambda: b'window.YTD.tweets.part0 = [{"tweet": {"full_text": "A ship."}}]\n',
    "tree.conllu": lambda: b"# sent_id = 1\n1\tA\ta\tDET\n2\tship\tship\tNOUN\n",
    "film.ass": lambda: b"[Script Info]\nTitle: A\n[Events]\nDialogue: 0,0:00:01.00,A ship.\n",
    "film.sub": lambda: b"{0}{25}A ship.\n",
    "film.sbv": lambda: b"0:00:01.000,0:00:02.000\nA ship.\n",
    "film.smi": lambda: b"<SAMI><BODY><SYNC Start=1>A ship.</BODY></SAMI>\n",
    "song.lrc": lambda: b"[ar:Anna]\n[00:01.00]A ship.\n",
    "dump.sql": lambda: b"-- MySQL dump 10.13\nINSERT INTO t VALUES ('A ship');\n",
}
"""Files that are read with their marks, and named."""
SKIPPED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a.zip": ("a zip archive; unpack it", lambda: zip_of({"a.txt": SENTENCE})),
    "sheets.xlsx": ("save sheets as CSV", lambda: zip_of({"xl/workbook.xml": "<workbook/>"})),
    "a.tar": ("a tar archive; unpack it", _tar),
    "a.tar.gz": ("a tar archive; unpack it", lambda: gzip.compress(_tar())),
    "a.7z": ("a 7z archive", lambda: b"7z\xbc\xaf\x27\x1c\0\4" + b"x" * 30),
    "a.rar": ("a RAR archive", lambda: b"Rar!\x1a\x07\x01\0" + b"x" * 30),
    "a.txt.lz4": ("an lz4 file", lambda: b"\x04\x22\x4d\x18" + b"x" * 30),
    "a.rtf": ("an RTF document", lambda: rb"{\rtf1\ansi{\fonttbl{\f0 Arial;}}\f0 A ship.\par}"),
    "old.doc": (
        "an old Microsoft Office",
        lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 99,
    ),
    "book.mobi": ("Kindle", lambda: b"B" * 60 + b"BOOKMOBI" + b"\0" * 99),
    "scan.djvu": ("DjVu", lambda: b"AT&TFORM\0\0\0\0DJVU"),
    "page.ps": ("PostScript", lambda: b"%!PS-Adobe-3.0\n(A ship) show\n"),
    "lfs.jsonl": ("Git LFS", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "array.npy": ("an array of NumPy", _npy),
    "object.pkl": ("a pickle", lambda: pickle.dumps({"text": SENTENCE})),
    "notes.txt": ("a pickle", lambda: pickle.dumps({"text": SENTENCE}, protocol=0)),
    "letter.txt": ("bytes written as letters", _uuencoded),
    "model.safetensors": (
        "weights of a model",
        lambda: len(_SAFETENSORS).to_bytes(8, "little") + _SAFETENSORS + b"\0" * 4,
    ),
    "picture.png": ("a picture", lambda: b"\x89PNG\r\n\x1a\n" + b"\0" * 30),
    "picture.jpg": ("a picture", lambda: b"\xff\xd8\xff\xe0" + b"x" * 30),
    "sound.wav": ("sound or film", _wav),
    "sound.mp3": ("sound or film", lambda: b"ID3\x09\0" + b"x" * 30),
    "old.mov": ("sound or film", lambda: b"\0\0\0\x30moov" + b"x" * 30),
    "train.json": ("must be YAML", lambda: b'{"data": {"source": "a"},\n "train": {"steps": 9}}\n'),
    "train.toml": ("must be YAML", lambda: b'# ships\n[data]\nsource = "a"\n[train]\nsteps = 9\n'),
    "program": ("a program", lambda: b"\x7fELF" + b"\0" * 30),
    "crawl.arc": ("an ARC archive", lambda: b"filedesc://a.arc 0.0.0.0 2003 text/plain 9\n1 0 A\n"),
    "crawl.wat": ("the WET file", as_warc),
    "wide-without-mark.txt": ("if it is UTF-16", lambda: SENTENCE.encode("utf-16-le")),
    "wide-big.txt": ("-f UTF-16be", lambda: SENTENCE.encode("utf-16-be")),
    "old-japanese.txt": ("text in ISO 2022", lambda: "船が行く。".encode("iso-2022-jp")),
    "named.txt.gz": ("does not start like a gzip file", lambda: b"A ship.\n"),
    "latin.txt": ("not UTF-8 text", lambda: ("caf\xe9 " * 9).encode("latin-1")),
    "rows.parquet": ("its name is that of a Parquet file", lambda: b"no table\n"),
    "empty.parquet": ("its name is that of a Parquet file", lambda: b""),
    "paper.pdf": ("its name is that of a PDF document", lambda: b"no paper\n"),
    "error.jsonl": ("a page of HTML", lambda: b"<!DOCTYPE html><html>404</html>"),
    "empty.txt": ("empty text", lambda: b""),
}
"""Files that are not read: the reason that is shown, and how the file is made."""


def write_odd_folder(folder: Path) -> None:
    """Write all of them."""
    folder.mkdir()
    for name, make in {**READ, **AS_WRITTEN, **{k: m for k, (_, m) in SKIPPED.items()}}.items():
        (folder / name).write_bytes(make())
    (folder / "rows.sqlite").write_bytes(_sqlite(folder))
