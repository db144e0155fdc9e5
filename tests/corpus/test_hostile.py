"""A folder of 200 hostile files: nothing crashes or hangs, and each file is reported or read."""

from __future__ import annotations

import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus_files import FORMATS, PACKING, PAGE, as_warc
from prepared import read_everything
from pretrain.corpus.documents import ReadingReport
from pretrain.corpus.reading import read_documents
from pretrain.data.preparation import prepare

N_FILES = 200
SAMPLES: dict[str, Callable[[], bytes]] = {
    **FORMATS,
    "page.html": lambda: PAGE.encode(),
    "crawl.warc": as_warc,
    "plain.txt": lambda: "Plain text, with an ümlaut.\n".encode() * 40,
    "wide.txt": lambda: ("wide " * 50).encode("utf-16"),
}


def flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def splice(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + draw.randbytes(draw.randint(1, 200)) + data[place:]


def repeat(data: bytes, draw: random.Random) -> bytes:
    return data * draw.randint(2, 5)


def fill(data: bytes, draw: random.Random) -> bytes:
    return bytes([draw.choice([0, 10, 34, 123, 255])]) * draw.randint(1, 5000) + data


MUTATIONS = [flip, cut, splice, repeat, fill]


def hostile_folder(folder: Path, seed: int) -> list[str]:
    """Files of all formats and packings, damaged before or after packing, under true and false
    names."""
    draw = random.Random(seed)
    names = []
    for number in range(N_FILES):
        name, made = draw.choice(list(SAMPLES.items()))
        suffix, compress = draw.choice(PACKING)
        data = made()
        if draw.random() < 0.5:
            data = draw.choice(MUTATIONS)(data, draw)
        data = compress(data)
        if draw.random() < 0.6 and data:
            data = draw.choice(MUTATIONS)(data, draw)
        if draw.random() < 0.3:
            name = draw.choice(["x.txt", "x.jsonl", "x.parquet", "x.csv", "x", "x.html", "x.json"])
        place = folder / draw.choice(["", "a", "a/b"]) / f"{number:03}-{name}{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        names.append(place.relative_to(folder).as_posix())
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere").symlink_to(folder / "missing")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "empty").write_bytes(b"")
    (folder / "line\nbreak.txt").write_text("a name with a newline", encoding="utf-8")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("a name that is not UTF-8", encoding="utf-8")
    return [*names, "loop", "nowhere", "pipe.jsonl", "empty"]


@pytest.mark.parametrize("seed", range(3))
def test_every_hostile_file_is_read_or_reported(tmp_path: Path, seed: int) -> None:
    for package in ("pyarrow", "resiliparse", "fastwarc", "zstandard"):
        pytest.importorskip(package)
    names = hostile_folder(tmp_path, seed)
    report = ReadingReport()
    problems: list[str] = []
    report.on_problem = lambda problem: problems.append(problem.file)
    read = {document.source for document in read_documents(tmp_path, report=report)}
    silent = [name for name in names if name not in read and name not in problems]
    assert silent == []
    assert len(problems) == report.n_problems
    assert report.n_documents > 50
    json.dumps(report.as_dict())


def test_a_hostile_folder_can_be_prepared(tmp_path: Path) -> None:
    for package in ("pyarrow", "resiliparse", "fastwarc", "zstandard"):
        pytest.importorskip(package)
    hostile_folder(tmp_path / "hostile", seed=7)
    data = prepare(tmp_path / "hostile", tmp_path / "out", vocab_size=300)
    read_everything(data)
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "out/problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == report["n_problems"] > 50
    assert all(stat.S_ISREG(path.stat().st_mode) for path in (tmp_path / "out").glob("*.*"))
