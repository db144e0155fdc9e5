"""Prepared folders: ids are read back as written, and changed files are rejected."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prepared import read_everything
from pretrain.corpus.documents import Document
from pretrain.data.config import DataConfig, SourceConfig
from pretrain.data.format import MixedData, TokenStream, is_prepared, open_prepared
from pretrain.data.preparation import prepare
from pretrain.data.writer import TaskWriter, join_stream


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    records = [{"text": f"document {n} " + "word " * (9000 + n)} for n in range(30)]
    source = folder / "a.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare(source, folder / "out", tokenizer="bytes")
    return folder / "out"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("vocab_size", "width"), [(300, 2), (65536, 2), (65537, 4)])
def test_round_trip(tmp_path: Path, vocab_size: int, width: int) -> None:
    draw = np.random.default_rng(0)
    documents = [draw.integers(8, vocab_size, size) for size in (1, 5, 700_000, 3)]
    parts = []
    for number, part in enumerate((documents[:2], [], documents[2:])):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer = TaskWriter(folder, name="train", vocab_size=vocab_size, end_of_text=7)
        for document in part:
            half = len(document) // 2
            ids = [document[:half], document[half:]]
            n_tokens = writer.add(Document(id="one", text=""), ids, n_bytes=len(document))
            assert n_tokens == len(document)
        writer.close()
        parts.append((folder, "ab"[number // 2]))
    info = join_stream(tmp_path, parts, name="train", vocab_size=vocab_size, end_of_text=7)
    stream = TokenStream(tmp_path, info, vocab_size=vocab_size)
    expected = np.concatenate([[7], *[np.append(document, 7) for document in documents]])
    assert stream.read(0, stream.n_tokens).tolist() == expected.tolist()
    assert stream.read(3, 9).tolist() == expected[3:9].tolist()
    assert stream.read(3, 9).dtype == np.int64
    assert (stream.n_documents, stream.n_bytes) == (4, 700_009)
    assert [(share.source, share.n_documents, share.n_tokens) for share in stream.sources] == [
        ("a", 2, 8),
        ("b", 2, 700_005),
    ]
    offsets = stream.document_offsets
    for number, document in enumerate(documents):
        found = stream.read(int(offsets[number]), int(offsets[number + 1]))
        assert found.tolist() == [*document.tolist(), 7]
    assert (tmp_path / "train.bin").stat().st_size == 64 + width * len(expected)
    for start, stop in ((-1, 2), (5, 4), (0, stream.n_tokens + 1)):
        with pytest.raises(ValueError, match="must be in 0 to"):
            stream.read(start, stop)


def test_a_file_truncated_during_a_run_is_an_error(folder: Path) -> None:
    stream = open_prepared(folder).split("train")
    stream.read(0, 1)
    with open(folder / "train.bin", "r+b") as file:
        file.truncate(64 + 2 * 100_000)
    assert len(stream.read(0, 100_000)) == 100_000
    with pytest.raises(ValueError, match=r"train\.bin ends at byte 200,064: it was trunc"):
        stream.read(99_000, 101_000)


@pytest.mark.skipif(not hasattr(os, "pread"), reason="needs os.pread")
def test_short_reads_are_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, plain = open_prepared(folder).split("train"), os.pread
    expected = stream.read(5, 5005)
    monkeypatch.setattr(os, "pread", lambda file, n, at: plain(file, min(n, 999), at))
    assert np.array_equal(stream.read(5, 5005), expected)


def test_ids_are_read_where_the_system_cannot_read_by_position(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_prepared(folder).split("train")
    expected = stream.read(5, 5005)
    monkeypatch.delattr(os, "pread", raising=False)
    assert np.array_equal(stream.read(5, 5005), expected)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_ids_that_were_read_do_not_stay_in_memory(tmp_path: Path) -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    ids = tmp_path / "part"
    ids.mkdir()
    part = TaskWriter(ids, name="train", vocab_size=300, end_of_text=7)
    chunks = (np.ones(1 << 20, np.int64) for _ in range(30))
    part.add(Document(id="one", text=""), chunks, n_bytes=1)
    part.close()
    info = join_stream(tmp_path, [(ids, "a")], name="train", vocab_size=300, end_of_text=7)
    stream = TokenStream(tmp_path, info, vocab_size=300)
    stream.read(0, 1000)
    before = resident()
    for start in range(0, stream.n_tokens - 257, 1 << 12):
        stream.read(start, start + 257)
    assert resident() - before < 10e6  # of 60


def test_ids_out_of_range_are_not_written(tmp_path: Path) -> None:
    writer = TaskWriter(tmp_path, name="val", vocab_size=300, end_of_text=0)
    # In 16 bits 65541 would silently become 5.
    for bad in (300, -1, 65536 + 5):
        low, high = sorted((1, bad))
        message = f"token ids must be in 0 to 299 (got {low} to {high})"
        with pytest.raises(ValueError, match=re.escape(message)):
            writer.add(Document(id="one", text=""), [np.array([1, bad])], n_bytes=1)
    writer.close()


def test_a_complete_folder_opens(folder: Path) -> None:
    data = open_prepared(folder)
    read_everything(data)
    assert is_prepared(folder)
    assert not is_prepared(folder.parent)
    assert data.tokenizer().vocab_size == data.manifest.vocab_size == 257
    with pytest.raises(ValueError, match="must be one of train, val"):
        data.split("test")  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [-1, 1, -500_000])
def test_a_wrong_file_size_is_reported_with_both_sizes(folder: Path, change: int) -> None:
    path = folder / "train.bin"
    n_bytes = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(n_bytes + change)
    message = f"train.bin is damaged: its size in bytes must be {n_bytes} (got {n_bytes + change})"
    with pytest.raises(ValueError, match=re.escape(message)):
        open_prepared(folder)


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("block", [0, 1])
def test_a_flipped_bit_is_named_when_its_block_is_first_read(folder: Path, block: int) -> None:
    flip_bit(folder / "train.bin", 64 + block * (1 << 20) + 1000)
    stream = open_prepared(folder).split("train")
    middle = (1 << 20) // 2  # the first id of block 1
    other = [(0, 10), (middle + 9_000, middle + 9_100)][1 - block]
    assert len(stream.read(*other)) == other[1] - other[0]
    # Far from the flipped bit, and over the border of the blocks.
    for start, stop in ([(1, 2), (middle + 7, middle + 8)][block], (middle - 1, middle + 1)):
        with pytest.raises(
            ValueError, match=rf"train\.bin is damaged: its CRC-32 of block {block} "
        ):
            stream.read(start, stop)


def test_damaged_held_out_ids_are_rejected_in_a_mixture_too(folder: Path, original: Path) -> None:
    flip_bit(folder / "val.bin", (folder / "val.bin").stat().st_size - 1)
    parts = [open_prepared(original), open_prepared(folder)]
    config = DataConfig(source=tuple(SourceConfig(path=p, weight=1.0) for p in "ab"))
    stream = MixedData(config, parts).split("val")
    assert len(stream.read(0, 100)) == 100
    with pytest.raises(
        ValueError, match=r"copy/val\.bin is damaged: its CRC-32 of block 0 .*delete"
    ):
        stream.read(stream.n_tokens - 100, stream.n_tokens - 90)


def test_a_block_is_compared_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_prepared(folder).split("train")
    sizes: list[int] = []
    crc32 = zlib.crc32

    def recorded(data: bytes) -> int:
        sizes.append(len(data))
        return crc32(data)

    monkeypatch.setattr(zlib, "crc32", recorded)
    for start in range(0, stream.n_tokens - 257, 10_000):
        stream.read(start, start + 257)
    assert sum(sizes) == 2 * stream.n_tokens


def test_the_header_is_checked(folder: Path) -> None:
    for place, value, reason in (
        (0, b"NUMPY", "first bytes must be b'PTSHARD"),
        (8, b"\x09", r"format version must be 4 \(got 9\)"),
        (12, b"\x04", r"bytes per id must be 2 \(got 4\)"),
        (16, b"\x00\x00", "number of ids must be"),
    ):
        content = (folder / "val.bin").read_bytes()
        with open(folder / "val.bin", "r+b") as file:
            file.seek(place)
            file.write(value)
        with pytest.raises(ValueError, match=reason):
            open_prepared(folder)
        (folder / "val.bin").write_bytes(content)


def test_damaged_offsets_are_detected(folder: Path) -> None:
    path = folder / "train.offsets"
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.offsets is damaged: its SHA-256 must be"):
        open_prepared(folder).split("train").document_offsets  # noqa: B018
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"train\.offsets is damaged: its size in bytes must be"):
        open_prepared(folder)


def test_another_tokenizer_is_rejected(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(
        ValueError, match=r"SHA-256 \(of the tokenizer that wrote the ids\) must be"
    ):
        open_prepared(folder)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        open_prepared(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format="x"), "has the format 'x'; it must be 'pretrain-shards'"),
        (
            lambda m: m.update(format_version=2),
            "has format version 2; this package reads only 4: prepare the data again",
        ),
        (lambda m: m.pop("vocab_size"), "is damaged: manifest needs a value for 'vocab_size'"),
        (
            lambda m: m.update(vocab_size="many"),
            "manifest.vocab_size is 'many'; it must be a whole number",
        ),
        (lambda m: m["streams"].pop("val"), "manifest.streams needs a value for 'val'"),
        (
            lambda m: m["streams"]["val"].update(file="../../x"),
            "val.file is '../../x'; it must be the name of a file in the same",
        ),
        (
            lambda m: m["streams"]["val"].update(n_tokens=-1),
            r"val\.n_tokens is -1; it must be at least 0",
        ),
        (
            lambda m: m["streams"]["val"].update(max_id=257),
            "has id 257, but ids must be below the 257 tokens",
        ),
        (lambda m: m["streams"]["val"].pop("sources"), "val needs a value for 'sources'"),
        (lambda m: m["streams"]["val"]["sources"].pop(), "number of tokens of all sources must be"),
        (
            lambda m: m["streams"]["val"].update(n_bytes=m["streams"]["val"]["n_bytes"] + 1),
            "number of bytes of all sources must be",
        ),
        (
            lambda m: m["streams"]["train"]["sources"][0].update(n_documents=1),
            "number of documents of all sources must be",
        ),
        (
            lambda m: m["streams"]["val"]["sources"][0].update(n_tokens="x"),
            "n_tokens is 'x'; it must be a whole number",
        ),
        (
            lambda m: m["streams"]["val"].update(block_checksums=[]),
            r"number of checksums must be \d+ \(got 0\)",
        ),
        (lambda m: m.update(streams=[]), "manifest.streams is \\[\\]; it must be a mapping"),
    ],
)
def test_changed_manifests_are_rejected(
    folder: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    change_manifest(folder, change)
    with pytest.raises(ValueError, match=reason):
        open_prepared(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_an_unreadable_manifest_is_rejected(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    assert not is_prepared(folder)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        open_prepared(folder)
