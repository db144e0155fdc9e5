"""Where documents came from: the file of origins, the counts of each source, the outliers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pretrain.corpus.documents import Document
from pretrain.data.format import open_prepared
from pretrain.data.preparation import prepare
from pretrain.data.writer import Compression, compression_of, compression_outliers, extremes
from pretrain.tokenizer.train import train_tokenizer

WORDS = "the sea was calm and the old ship went home with many men on her deck".split()


def prose(draw: random.Random, n_words: int = 120) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(n_words))


@pytest.fixture
def two_sources(tmp_path: Path) -> list[Path]:
    draw = random.Random(0)
    books, letters = tmp_path / "books", tmp_path / "letters.jsonl"
    books.mkdir()
    for number in range(30):
        (books / f"{number:02}.txt").write_text(prose(draw), encoding="utf-8")
    lines = [json.dumps({"id": f"l{n}", "title": f"T{n}", "text": prose(draw)}) for n in range(30)]
    lines[7] = '{"id": "noise", "text": "' + draw.randbytes(400).hex() + '"}'
    lines.insert(3, "no json")
    letters.write_text("\n".join(lines), encoding="utf-8")
    return [books, letters]


def test_the_report_counts_each_source_and_every_problem(
    tmp_path: Path, two_sources: list[Path]
) -> None:
    books, letters = (str(path) for path in two_sources)
    data = prepare(two_sources, tmp_path / "out", vocab_size=300, val_fraction=0.2)
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert set(report["sources"]) == {books, letters}
    assert [report["sources"][name]["n_files"] for name in (books, letters)] == [30, 1]
    assert [report["sources"][name]["n_documents"] for name in (books, letters)] == [30, 30]
    counted = sum(counts["n_tokens"] for counts in report["sources"].values())
    # Each stream begins with an end-of-text token, and each document ends with one.
    assert counted == sum(report["n_tokens"].values()) - 60 - 2
    n_bytes = sum(counts["n_text_bytes"] for counts in report["sources"].values())
    assert n_bytes == data.split("train").n_bytes + data.split("val").n_bytes
    (problem,) = (tmp_path / "out/problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(problem)["line"] == 4
    assert report["strangest"][0]["id"] == "noise"
    assert len(report["strangest"]) == 10


def test_all_problems_are_written_although_the_report_has_only_the_first(tmp_path: Path) -> None:
    lines = ["bad"] * 500 + [json.dumps({"text": "a good line of text " * 30})] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer="bytes")
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert (report["n_problems"], len(report["problems"])) == (500, 100)
    problems = (tmp_path / "out/problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in problems] == list(range(1, 501))


def test_origins_are_in_the_order_of_the_stream(tmp_path: Path, two_sources: list[Path]) -> None:
    data = prepare(two_sources, tmp_path / "out", vocab_size=300, val_fraction=0.2)
    tokenizer, n = data.tokenizer(), 0
    for split in ("train", "val"):
        stream = data.split(split)
        offsets = stream.document_offsets
        for number, origin in enumerate(stream.origins()):
            text = tokenizer.decode(stream.read(offsets[number], offsets[number + 1] - 1).tolist())
            if origin.file.endswith(".txt"):
                assert Path(origin.file).read_text(encoding="utf-8") == text
            else:
                line = two_sources[1].read_bytes()[origin.offset :].splitlines()[0]
                assert json.loads(line)["text"] == text
                assert json.loads(line)["id"] == origin.id
            n += 1
    assert n == 60


def test_damaged_origins_are_detected(tmp_path: Path, two_sources: list[Path]) -> None:
    prepare(two_sources, tmp_path / "out", tokenizer="bytes")
    path = tmp_path / "out/train.documents.jsonl"
    path.write_bytes(path.read_bytes().replace(b"l1", b"l9", 1))
    with pytest.raises(ValueError, match=r"train\.documents\.jsonl is damaged: its SHA-256 must"):
        next(open_prepared(tmp_path / "out").split("train").origins())
    for content in (b"{}\n", b"\xff\n", b"[", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train\.documents\.jsonl is damaged: its SHA-256 "):
            next(open_prepared(tmp_path / "out").split("train").origins())


@pytest.mark.parametrize("seed", range(30))
def test_outliers_are_the_documents_furthest_from_the_mean(seed: int) -> None:
    draw = random.Random(seed)
    compressions: list[Compression] = []
    ratios = {}
    n_tokens = n_bytes = 0
    for number in range(draw.randint(11, 200)):
        size = draw.randrange(64, 5000)
        tokens = max(1, int(size / draw.lognormvariate(1.2, 0.8)))
        ratios[str(number)] = size / tokens
        n_tokens, n_bytes = n_tokens + tokens, n_bytes + size
        compressions += compression_of(Document(str(number), "x"), n_tokens=tokens, n_bytes=size)
        if number % 50 == 0:
            compressions = extremes(compressions)
    mean = n_bytes / n_tokens

    def distance(name: str) -> float:
        return max(ratios[name] / mean, mean / ratios[name])

    expected = sorted(ratios, key=distance, reverse=True)[:10]
    outliers = compression_outliers(compressions, n_tokens=n_tokens, n_bytes=n_bytes)
    assert [entry["id"] for entry in outliers] == expected


def test_a_document_without_tokens_is_not_an_outlier(tmp_path: Path) -> None:
    train_tokenizer(["the sea was calm " * 50], name="gpt").save(tmp_path / "gpt")
    lines = [json.dumps({"text": text}) for text in ("\u200b" * 40, "the sea was calm. " * 99)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tmp_path / "gpt")
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert {each["id"] for each in report["strangest"]} <= {"a.jsonl:2"}


def test_there_are_no_outliers_if_every_byte_is_a_token(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the sea was calm. " * 200, encoding="utf-8")
    prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="bytes")
    assert json.loads((tmp_path / "out/report.json").read_text())["strangest"] == []
    with pytest.raises(ValueError, match="is already prepared"):
        prepare([tmp_path / "a.txt", tmp_path / "out"], tmp_path / "again")
