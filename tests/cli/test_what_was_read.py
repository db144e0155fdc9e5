"""Every command that reads a corpus says what is not in the text, with its share of the bytes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pretrain.cli import main
from tiny import TINY

Capture = pytest.CaptureFixture[str]


@pytest.fixture(name="folder")
def folder_with_problems(tmp_path: Path, corpus: Path) -> Path:
    """A corpus of which a cut archive, a picture and a third of the records are not read."""
    folder = tmp_path / "texts"
    folder.mkdir()
    records = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()[:30]]
    lines = [json.dumps({"text": record["text"][:900]}) for record in records]
    lines[::3] = [line.replace('"text"', '"text_2"') for line in lines[::3]]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    packed = gzip.compress("\n".join(line[::-1] for line in lines).encode())
    (folder / "b.txt.gz").write_bytes(packed[:-500])
    (folder / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 2000)
    return folder


def test_train_says_what_it_skipped_also_from_the_cache(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    for name in ("first", "cached"):
        run = tmp_path / name
        words = ["train", str(folder), *TINY, "--train.steps", "1", "--run", str(run), "--json"]
        capsys.readouterr()
        assert main(words) == 0
        captured = capsys.readouterr()
        after = captured.err[captured.err.index("\n  text ") :]
        assert "of the bytes of 3 files:" in after
        assert "10 records, " in after
        assert "no field 'text'; its fields are 'text_2' (a.jsonl, line 1, byte 0; ...)" in after
        assert "1 cut-off file: the gzip file is truncated" in after
        assert "(c.png)" in after
        assert "guessed: 'text' (least in a.jsonl)" in after
        (reading,) = json.loads(captured.out)["reading"]
        assert reading == json.loads((run / "summary.json").read_text())["reading"][0]
        shares = {o["unit"]: o["n_bytes"] for o in reading["omitted"].values() if o["n_bytes"]}
        assert shares["record"] == pytest.approx((folder / "a.jsonl").stat().st_size / 3, rel=0.05)
        assert shares["file"] == (folder / "c.png").stat().st_size
        page = (run / "report.html").read_text(encoding="utf-8")
        assert "1 cut-off file: the gzip file is truncated" in page


def test_other_commands_say_what_they_skipped(
    folder: Path, tmp_path: Path, finished_run: Path, capsys: Capture
) -> None:
    texts, out = str(folder), str(tmp_path / "out")
    for words in (
        ["prepare", texts, "--vocab-size", "300"],
        ["tokenizer", "train", texts, "--vocab-size", "300"],
        ["tokenizer", "inspect", texts, "--tokenizer", str(finished_run)],
    ):
        capsys.readouterr()
        to = [] if "inspect" in words else ["--out", f"{out}-{words[0]}"]
        assert main([*words, *to, "--json"]) == 0
        captured = capsys.readouterr()
        assert "no field 'text'; its fields are 'text_2'" in captured.err
        assert "c.png" in captured.out


def test_a_corpus_that_is_mostly_skipped_is_a_warning(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (folder / "big.bin").write_bytes(b"\0" * 1_000_000)
    assert main(["prepare", str(folder), "--tokenizer", "bytes", "--out", str(tmp_path / "p")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in lines if line.startswith("warning"))
    assert "most of the source is not in the text: 97" in warning
