"""Sources: which files are listed, in which order, and which are skipped or rejected."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import pytest

from corpus_files import (
    read_texts,
    write_records,
)
from pretrain.corpus import files
from pretrain.corpus.documents import Document, ReadingReport
from pretrain.corpus.files import SUPPORTED_FORMATS, bundled_corpus, list_files
from pretrain.corpus.reading import read_documents


def test_bundled_corpus_is_complete() -> None:
    report = ReadingReport()
    documents = list(read_documents("bundled", report=report))
    assert (report.n_documents, report.n_text_bytes) == (371, 11_972_889)
    assert report.n_problems == 0
    assert len({document.id for document in documents}) == 371
    assert documents[0].title == "State of the Union Address, 1790"
    assert report.n_read_bytes == bundled_corpus().stat().st_size


def test_folder_is_read_in_order_of_relative_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.txt", "a.txt", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    write_records(tmp_path / "c.jsonl", {"text": "one"}, {"text": "two"})
    report = ReadingReport()
    found = list(read_documents(tmp_path, report=report))
    assert "2 hidden names: begins with a dot (.git, .hidden.txt)" in report.facts()["skipped"]
    assert report.n_problems == 0
    names = ["a.txt", "a/b/c.txt", "a/z.md", "b.txt", "c.jsonl:1", "c.jsonl:2"]
    assert [document.id for document in found] == names
    name = "a/b/c.txt"
    assert found[1] == Document(id=name, text=name, source=name)


def test_files_behind_links_are_read_once(tmp_path: Path) -> None:
    """Snapshots in the cache of huggingface_hub 1.x, DVC and git-annex are folders of links."""
    for name in ("blobs", "snapshot", "snapshot/data"):
        (tmp_path / name).mkdir()
    write_records(tmp_path / "blobs/1", {"text": "one"}, {"text": "two"})
    (tmp_path / "blobs/2").write_text("text\nthree\n")
    (tmp_path / "snapshot/data/b.jsonl").symlink_to("../../blobs/1")
    (tmp_path / "snapshot/a.csv").symlink_to("../blobs/2")
    (tmp_path / "snapshot/again.jsonl").symlink_to("../blobs/1")
    (tmp_path / "snapshot/nowhere").symlink_to("../blobs/3")
    report = ReadingReport()
    assert read_texts(tmp_path / "snapshot", report=report) == ["three", "one", "two"]
    assert {problem.file for problem in report.problems} == {"data/b.jsonl", "nowhere"}
    assert report.n_read_bytes == sum(f.stat().st_size for f in (tmp_path / "blobs").iterdir())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="no file, and 1 symbolic links that lead to none"):
        list_files(tmp_path / "empty")


def test_links_to_folders_and_pipes_in_a_folder_are_skipped(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="pipe") as raised:
        list_files(tmp_path / "pipe.txt")
    assert str(raised.value) == (
        f"source '{tmp_path}/pipe.txt' is a pipe or a device, not a file; copy it to a file first"
    )


def test_runs_and_prepared_texts_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for folder, marks in (
        ("runs/a-1", "config.yaml environment.json tokenizer"),
        ("b", "asked.yaml"),
        ("imported", "config.yaml checkpoints tokenizer"),
        ("prepared", "manifest.json report.json tokenizer"),
        ("mine", "config.yaml environment.json"),  # not written by pretrain
    ):
        (tmp_path / folder).mkdir(parents=True)
        for name in [*marks.split(), "samples.jsonl"]:
            (tmp_path / folder / name).write_text("{}")
    report = ReadingReport()
    found = {file.name.split("/")[0] for file in list_files(tmp_path, report=report)}
    assert found == {"a.txt", "mine"}
    problems = " ".join(problem.file for problem in report.problems)
    assert problems == "b/ imported/ prepared/ runs/a-1/"
    with pytest.raises(ValueError, match="resume") as raised:
        list_files(tmp_path / "runs/a-1")
    assert str(raised.value) == (
        f"source '{tmp_path}/runs/a-1' was written by pretrain: it is a run or a prepared text; "
        "resume a run with pretrain train --resume --run DIR, or with pretrain extend DIR"
    )


def test_folder_without_text_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file") as raised:
        list_files(tmp_path)
    assert str(raised.value) == f"folder '{tmp_path}' contains no file; {SUPPORTED_FORMATS}"
    (tmp_path / "a.bin").write_bytes(b"no format\0\x01")
    report = ReadingReport(strict=True)
    assert read_texts(tmp_path, report=report) == []
    assert (report.n_skipped_files, report.problems[0].offset) == (1, 9)
    with pytest.raises(ValueError, match=r"a\.bin, byte 9: binary.*readable formats are text"):
        read_texts(tmp_path / "a.bin")


def test_missing_path_suggests_near_names(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(ValueError, match="shakespear") as raised:
        list_files(tmp_path / "shakespear.txt")
    assert str(raised.value) == (
        f"source '{tmp_path}/shakespear.txt' does not exist; the same folder contains "
        "'shakespeare.txt'"
    )


def test_source_that_cannot_be_a_path_is_rejected(tmp_path: Path) -> None:
    message = r"^source 'a\\x00b' must be a path: (stat: )?embedded null (byte|character in path)$"
    with pytest.raises(ValueError, match=message):
        list_files("a\0b")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="cannot be read") as raised:
        list_files(tmp_path / "a.txt" / "b")
    assert str(raised.value) == f"source '{tmp_path}/a.txt/b' cannot be read: Not a directory"


def test_several_sources_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("third", encoding="utf-8")
    (tmp_path / "z.jsonl").write_text('{"text": "first"}\n', encoding="utf-8")
    sources = [tmp_path / "z.jsonl", tmp_path / "books", tmp_path / "a.txt"]
    assert read_texts(sources) == ["first", "second", "third"]
    names = [file.name for file in list_files(sources)]
    places = [tmp_path / "z.jsonl", tmp_path / "books" / "b.txt", tmp_path / "a.txt"]
    assert names == [place.as_posix() for place in places]
    # One source in a list is that source.
    assert list_files([tmp_path / "books"]) == list_files(tmp_path / "books")


@pytest.mark.parametrize("second", ["books", "books/b.txt"])
def test_file_in_two_sources_is_rejected(tmp_path: Path, second: str) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match="twice") as raised:
        list_files([tmp_path / "books", tmp_path / second])
    assert str(raised.value) == (
        f"'{tmp_path}/books/b.txt' would be read twice: as part of '{tmp_path}/books' "
        f"and of '{tmp_path}/{second}'"
    )
    for nothing in ([], "", [str(tmp_path), ""]):
        with pytest.raises(
            ValueError, match=r"^no source of text; name files, folders or glob patterns$"
        ):
            list_files(nothing)


def test_glob_patterns(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "[1].txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert read_texts(str(tmp_path / "[ab].txt")) == ["a.txt", "b.txt"]
    assert read_texts(str(tmp_path / "[1].txt")) == ["[1].txt"]
    with pytest.raises(ValueError, match="pattern") as raised:
        read_texts(str(tmp_path / "*.pdf"))
    assert str(raised.value) == f"no file matches the pattern '{tmp_path}/*.pdf'"


def test_unreadable_file_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unreadable, or gone since it was listed; root may read everything, hence the patch."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")

    def open_all_but_a(path: Path, mode: str) -> BinaryIO:
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return open(path, "rb")

    monkeypatch.setattr(files, "open", open_all_but_a, raising=False)
    report = ReadingReport()
    assert read_texts(tmp_path, report=report) == ["b.txt"]
    assert "cannot be read: Permission denied" in report.problems[0].reason
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        read_texts(tmp_path / "a.txt")
