"""Preparing: every byte of text is in exactly one split, and impossible settings are rejected."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from prepared import read_everything
from pretrain.corpus.config import CorpusConfig
from pretrain.corpus.duplicates import text_hash
from pretrain.data import jobs
from pretrain.data.config import DataConfig
from pretrain.data.format import PreparedData, SplitName
from pretrain.data.jobs import KEY
from pretrain.data.preparation import prepare, prepared_key
from pretrain.data.stages import Split, choose_split, n_folds
from pretrain.tokenizer.train import train_tokenizer


def random_words(draw: random.Random, n_words: int) -> str:
    vowels, others = "aeiou", "bcdfghlmnprst"
    return " ".join(
        "".join(draw.choice(others) + draw.choice(vowels) for _ in range(draw.randint(1, 4)))
        for _ in range(n_words)
    )


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(data: PreparedData, name: SplitName) -> list[str]:
    stream, tokenizer = data.split(name), data.tokenizer()
    offsets = stream.document_offsets
    assert stream.read(0, 1).tolist() == [data.manifest.end_of_text]
    found = []
    for start, stop in pairwise(offsets):
        ids = stream.read(int(start), int(stop))
        assert ids[-1] == data.manifest.end_of_text
        assert data.manifest.end_of_text not in ids[:-1]
        found.append(tokenizer.decode(ids))
    assert sum(len(text.encode()) for text in found) == stream.n_bytes
    return found


@pytest.fixture(scope="module")
def many() -> list[str]:
    draw = random.Random(1)
    return [random_words(draw, draw.randint(5, 80)) + f" {n}\n<|endoftext|>" for n in range(300)]


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "characters"])
def test_every_document_is_in_one_split_in_order(
    tmp_path: Path, many: list[str], tokenizer: str
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many)
    data = prepare(source, tmp_path / "out", tokenizer=tokenizer, val_fraction=0.2)
    read_everything(data)
    train, val = texts_of(data, "train"), texts_of(data, "val")
    assert train == [text for text in many if text in set(train)]
    assert val == [text for text in many if text in set(val)]
    assert sorted(train + val) == sorted(many)
    assert 30 < len(val) < 90
    assert data.manifest.split_policy == "documents"
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["n_documents"] == 300
    assert report["n_tokens"]["val"] == data.split("val").n_tokens
    left_over = {path.name for path in tmp_path.iterdir()}
    assert left_over == {"a.jsonl", "out"}


def test_the_same_text_gives_the_same_folder(tmp_path: Path, many: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many)
    for name in ("one", "two"):
        prepare(source, tmp_path / name)
    names = ["manifest.json", "train.bin", "val.bin", "val.offsets", "tokenizer/tokenizer.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_split_depends_on_the_document_alone(tmp_path: Path, many: list[str]) -> None:
    val = []
    for number, texts in enumerate((many, many[::-1] + many[:50] + ["new " * 30])):
        source = write_jsonl(tmp_path / f"{number}.jsonl", texts)
        data = prepare(source, tmp_path / f"out{number}", tokenizer="bytes", val_fraction=0.1)
        val.append(set(texts_of(data, "val")))
        assert not val[-1] & set(texts_of(data, "train"))
    assert val[0] <= val[1] <= val[0] | {"new " * 30}


def test_the_tokenizer_is_trained_without_validation_text(tmp_path: Path, many: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many)
    data = prepare(source, tmp_path / "a", val_fraction=0.2, vocab_size=300)
    held_out = set(texts_of(data, "val"))
    changed = [text if text not in held_out else text + " zzzz" * 20 for text in many]
    train_only = [text for text in many if text not in held_out]
    tokenizer = train_tokenizer(train_only, vocab_size=300)
    assert tokenizer.sha256 == data.manifest.tokenizer_sha256
    assert train_tokenizer(changed, vocab_size=300).sha256 != data.manifest.tokenizer_sha256


def test_few_documents_are_split_at_their_ends(tmp_path: Path) -> None:
    draw = random.Random(2)
    texts = [random_words(draw, 400), "tiny", random_words(draw, 900)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    data = prepare(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", val_fraction=0.25)
    train, val = texts_of(data, "train"), texts_of(data, "val")
    assert data.manifest.split_policy == "tails"
    assert [train[0] + val[0], train[1], train[2] + val[1]] == texts
    assert all(text.startswith(" ") for text in val)
    assert abs(len(val[1]) / len(texts[2]) - 0.25) < 0.02


def test_equal_documents_are_split_at_the_same_place(tmp_path: Path) -> None:
    text = random_words(random.Random(3), 200)
    source = write_jsonl(tmp_path / "a.jsonl", [text] * 50)
    data = prepare(source, tmp_path / "out", corpus=CorpusConfig(deduplicate="none"))
    assert data.manifest.split_policy == "tails"
    assert len(texts_of(data, "train")) == 50
    assert len(set(texts_of(data, "train"))) == len(set(texts_of(data, "val"))) == 1


def test_a_document_with_nearly_all_text_is_split_at_its_end() -> None:
    giant = "giant " * 100_000
    texts = [f"small {number}".encode() for number in range(40)] + [giant.encode()]
    keys = np.array([(*text_hash(text), len(text)) for text in texts], KEY)
    # Whatever its hash, a fraction this close to its own value would make it validation.
    key = int(keys["hash"][-1]) / 2**64
    split = choose_split(lambda: [keys[:7], keys[7:]], val_fraction=min(0.5, key + 1e-6))
    assert split.policy == ("tails" if key < 0.5 else "documents")
    assert dict(split.parts(giant))["train"]


def test_a_long_text_is_one_document(tmp_path: Path) -> None:
    text = (random_words(random.Random(4), 3000) + "\n") * 60
    assert len(text) > 1 << 20
    (tmp_path / "a.txt").write_text(text)
    data = prepare(tmp_path / "a.txt", tmp_path / "out")
    train, val = texts_of(data, "train"), texts_of(data, "val")
    assert (len(train), len(val)) == (1, 1)
    assert train[0] + val[0] == text
    tokenizer = data.tokenizer()
    stream = data.split("train")
    assert np.array_equal(tokenizer.encode(train[0]), stream.read(1, stream.n_tokens - 1))


def test_a_given_tokenizer_is_used(tmp_path: Path, many: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many)
    first = prepare(source, tmp_path / "one", vocab_size=400)
    second = prepare(source, tmp_path / "two", tokenizer=tmp_path / "one")
    assert second.manifest.tokenizer_sha256 == first.manifest.tokenizer_sha256
    assert second.split("train").sha256 == first.split("train").sha256
    with pytest.raises(ValueError, match="vocab_size is 500, but must be 400, the tokens of"):
        prepare(source, tmp_path / "three", tokenizer=tmp_path / "one", vocab_size=500)


def test_documents_that_a_given_tokenizer_cannot_encode_are_removed(
    tmp_path: Path, many: list[str]
) -> None:
    train_tokenizer(many, name="characters").save(tmp_path / "mine")
    source = write_jsonl(tmp_path / "a.jsonl", [*many[:100], many[0] + "\f", *many[100:]])
    data = prepare(source, tmp_path / "out", tokenizer=tmp_path / "mine")
    assert sorted(texts_of(data, "train") + texts_of(data, "val")) == sorted(many)
    removed = json.loads((tmp_path / "out/removed.jsonl").read_text())
    reason = "vocabulary: it lacks a character"
    assert (removed["id"], removed["reason"]) == ("a.jsonl:101", f"{reason}: '\\x0c'")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["removed"], report["n_kept_documents"]) == ({reason: 1}, 300)
    assert report["n_kept_text_bytes"] == data.split("train").n_bytes + data.split("val").n_bytes
    with pytest.raises(ValueError, match=rf"a\.jsonl:101: {reason}: '\\x0c' \(--strict"):
        prepare(source, tmp_path / "strict", tokenizer=tmp_path / "mine", strict=True)
    foreign = write_jsonl(tmp_path / "b.jsonl", [text + "\u4e2d" for text in many])
    with pytest.raises(ValueError, match=rf"0 documents, and nothing is left.*{reason}': 300"):
        prepare(foreign, tmp_path / "no", tokenizer=tmp_path / "mine")


def test_an_existing_output_is_rejected(tmp_path: Path, many: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many)
    (tmp_path / "out").mkdir()
    prepare(source, tmp_path / "out", tokenizer="bytes")
    with pytest.raises(FileExistsError, match="has 11 files"):
        prepare(source, tmp_path / "out", tokenizer="bytes")
    with pytest.raises(FileExistsError):
        prepare(source, source, tokenizer="bytes")


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    tiny = write_jsonl(tmp_path / "tiny.jsonl", ["hello world"])
    with pytest.raises(
        ValueError, match=r"the text is too small.* nothing is left for the held-out text"
    ):
        prepare(tiny, tmp_path / "out", tokenizer="bytes")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"other": 5}\n')
    with pytest.raises(ValueError, match="gave no document; skipped: 1 record, 100 % of the bytes"):
        prepare(empty, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.jsonl", "empty.jsonl"}


@pytest.mark.parametrize("value", [0.0, -0.1, 0.6, float("nan"), float("inf")])
def test_val_fraction_out_of_range(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"val_fraction is .*; it must be"):
        prepare("bundled", tmp_path / "out", val_fraction=value)
    with pytest.raises(ValueError, match=r"data\.val_fraction"):
        DataConfig(val_fraction=value)


@pytest.mark.parametrize(
    ("n_bytes", "fraction"),
    [
        # Of a small text a tenth, but 6 kB if these are at most a fifth.
        (1_000, 0.2),
        (30_000, 0.2),
        (40_000, 0.15),
        (60_000, 0.1),
        (4_000_000, 0.1),
        (12_000_000, 1 / 30),
        (5 * 10**8, 0.002),
        # The validation text is limited, however much text there is.
        (10**10, 2_000_000 / 10**10),
    ],
)
def test_default_val_fraction(n_bytes: int, fraction: float) -> None:
    keys = np.array([(1, 2, n_bytes)], KEY)
    split = choose_split(lambda: [keys], val_fraction=None)
    assert split.val_fraction == pytest.approx(fraction)


def test_no_split_loses_text() -> None:
    split = Split(val_fraction=0.1, policy="tails", bound=0)
    for text in ("x", "word " * 50, "字" * 500, "a" * 31, " " * 500):
        assert "".join(part for _, part in split.parts(text)) == text


def test_progress_and_key(tmp_path: Path, many: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many)
    seen: list[tuple[str, float]] = []
    prepare(source, tmp_path / "out", progress=lambda stage, part: seen.append((stage, part)))
    assert list(dict.fromkeys(stage for stage, _ in seen)) == [
        "looking for files",
        "reading",
        "filtering",
        "comparing",
        "choosing held-out text and tokenizer",
        "encoding",
        "writing",
    ]
    assert all(0 <= part <= 1 for _, part in seen)
    assert seen[-1] == ("writing", 1.0)

    key = prepared_key(source)
    assert key == prepared_key(str(source))
    assert key != prepared_key(source, val_fraction=0.1)
    assert key != prepared_key(source, tokenizer="bytes")
    write_jsonl(source, many[:-1])
    assert key != prepared_key(source)


@pytest.mark.parametrize("place", [0, 5000, 19_999])
def test_the_key_of_a_text_changes_with_letters_that_size_and_time_do_not_show(
    tmp_path: Path, place: int
) -> None:
    source = tmp_path / "a.txt"
    source.write_bytes(b"a" * 20_000)
    key, stat = prepared_key(source), source.stat()
    source.write_bytes(b"a" * place + b"b" + b"a" * (19_999 - place))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.stat().st_size == stat.st_size
    # Of a large file only the first and the last 4,096 bytes are looked at.
    assert (key == prepared_key(source)) == (place == 5000)


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, many: list[str], tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SHARD_TEXT_BYTES", 3000)
    source = write_jsonl(tmp_path / "a.jsonl", many)
    for workers in (1, 2, 3):
        prepare(source, tmp_path / f"{workers}", tokenizer=tokenizer, workers=workers)
    first = {path.name: path.read_bytes() for path in (tmp_path / "1").glob("*.*")}
    assert len(first) >= 9
    for workers in (2, 3):
        for name, content in first.items():
            assert (tmp_path / f"{workers}" / name).read_bytes() == content
    with pytest.raises(ValueError, match=r"workers must be at least 1 \(got 0\)"):
        prepare(source, tmp_path / "0", workers=0)


TAILS = ["word " * 900, "字" * 500, "a" * 31, " " * 500, "one\ntwo\n" * 60, "é" * 40, "x"]


@pytest.mark.parametrize("fraction", [0.2, 0.3, 1 / 7])
def test_folds_are_disjoint_parts_of_each_document(fraction: float) -> None:
    n = n_folds(fraction)
    assert n * fraction <= 1 + 1e-9 < (n + 1) * fraction + 2e-9
    for text in TAILS:
        held_out = []
        for fold in range(n):
            parts = list(Split(fraction, "tails", 0, fold).parts(text))
            assert "".join(part for _, part in parts) == text
            assert sum(name == "val" for name, _ in parts) <= 1
            assert any(name == "train" for name, _ in parts)
            held_out += [part for name, part in parts if name == "val"]
        if len(text) > 400 and text.strip():  # the last parts of the text, none left out
            assert len(held_out) == n
            assert text.endswith("".join(reversed(held_out)))
            assert max(map(len, held_out)) - min(map(len, held_out)) <= 18


def test_folds_of_documents_are_disjoint_ranges_of_hashes(many: list[str]) -> None:
    split = Split(0.2, "documents", 2**62)  # fold 0 is larger than the fraction
    held_out = [
        text
        for fold in range(5)
        for text in many
        if next(replace(split, fold=fold).parts(text))[0] == "val"
    ]
    assert sorted(held_out) == sorted(many)


def test_a_fold_without_documents_or_with_most_of_the_text_is_refused() -> None:
    """Fold 0 and 3 have a tenth each, 1 nothing, and 2 the rest."""
    of_fold = {0: 10, 2: 80, 3: 10}
    places = [(fold + (n + 0.5) / 40) / 5 for fold in of_fold for n in range(20)]
    keys = np.zeros(len(places), KEY)
    keys["hash"] = [int(place * 2**64) for place in places]
    keys["n_bytes"] = [of_fold[int(5 * place)] for place in places]

    def split(fold: int) -> Split:
        return choose_split(lambda: iter([keys]), val_fraction=0.2, fold=fold)

    assert split(0).policy == split(3).policy == "documents"
    for fold, n_bytes in ((1, 0), (2, 1600)):
        message = f"data.fold is {fold}, whose documents have {n_bytes:,} of "
        with pytest.raises(ValueError, match=message):
            split(fold)


def test_fold_0_is_the_split_of_before_and_a_large_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {n} of a text\n" for n in range(60)))
    prepared = [
        prepare(tmp_path / "a.txt", tmp_path / f"out{fold}", tokenizer="bytes", fold=fold)
        for fold in (0, 1)
    ]
    ids = [data.split("val").read(0, 200).tolist() for data in prepared]
    assert ids[0] != ids[1]
    assert [data.split("train").n_documents for data in prepared] == [1, 2]
    assert "fold" not in prepared[0].manifest.settings
    assert prepared[1].manifest.settings["fold"] == 1
    keys = [prepared_key(tmp_path / "a.txt", fold=fold) for fold in (0, 1)]
    assert keys[0] == prepared_key(tmp_path / "a.txt") != keys[1]
    with pytest.raises(ValueError, match=r"data.fold is 5; it must be in \[0, 4\]: 0.2 of the"):
        prepare(tmp_path / "a.txt", tmp_path / "out5", tokenizer="bytes", fold=5)
