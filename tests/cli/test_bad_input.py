"""User errors: exit code 2, a message that says what to do, no traceback, no files written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.load import list_checkpoints
from pretrain.cli import main
from tiny import TINY

Capture = pytest.CaptureFixture[str]


def rejection(capsys: Capture, *words: str, code: int = 2) -> str:
    """Run a command that must fail, and return its message."""
    capsys.readouterr()
    assert main(list(words)) == code
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> Path:
    """A working directory with good and bad files in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus, "good.jsonl")
    Path("binary.txt").write_bytes(bytes(range(256)) * 50)
    Path("empty.txt").write_bytes(b"")
    Path("blank.txt").write_text(" \n" * 10)
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/x").write_text("x")
    Path("bad.yaml").write_text("train: [1")
    Path("twice.yaml").write_text("train: {steps: 1, steps: 2}")
    Path("wrong.yaml").write_text("train: {step: 1}")
    Path("endless.yaml").write_text("data: {source: good.jsonl}")
    return tmp_path


STEPS = ["--train.steps", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.txt"], "neither a recipe (characters"),
        (["missing.yaml"], "there is no config file missing.yaml"),
        (["empty"], "contains no file"),
        (["binary.txt"], "binary"),
        (["empty.txt", *STEPS], "empty.txt"),
        (["blank.txt", *STEPS], "blank.txt"),
        (["bad.yaml"], "bad.yaml is not valid YAML: line 1: while parsing"),
        (["twice.yaml"], "duplicate key 'steps'"),
        (["wrong.yaml"], "did you mean 'train.steps'"),
        (["endless.yaml"], "train.steps or train.minutes must be given"),
        (["good.jsonl", "--train.stepz", "1"], "did you mean 'train.steps'"),
        (["good.jsonl", "--optimizer.learning_rate", "-1"], "must be above 0"),
        (["good.jsonl", "--optimizer.learning_rate", "1e400"], "must be a finite number"),
        (["good.jsonl", "--train.steps", "0"], "must be in [1, 10^10]"),
        (["good.jsonl", "--tokenizer.vocab_size", "100", *STEPS], "100"),
        (["good.jsonl", "--tokenizer.name", "wordpiece", *STEPS], "wordpiece"),
        (["good.jsonl", "--model.context_length", "999999", *STEPS], "the longest that fits"),
        (["good.jsonl", "--train.batch_tokens", "1000", *STEPS], "the nearest multiples are"),
        (["good.jsonl", "--train.micro_batch_rows", "300", *STEPS], "it must be in [1, 1]"),
        (
            ["good.jsonl", "--train.device", "cuda", *STEPS],
            "train.device cuda is not available here",
        ),
        (["good.jsonl", "--data.text_field", "nothing", *STEPS], "nothing"),
        (["good.jsonl", "--run", "full", *STEPS], "must be an empty folder"),
        (["good.jsonl", "--run", "binary.txt", *STEPS], "must be an empty folder"),
        (["good.jsonl", "--run", "binary.txt/run", *STEPS], "cannot write a run to"),
        (["good.jsonl", "--nonsense", *STEPS], ""),
        (["good.jsonl", "--train.steps"], "needs a value"),
    ],
)
def test_train_rejects(here: Path, capsys: Capture, words: list[str], message: str) -> None:
    before = sorted(here.rglob("*"))
    assert message in rejection(capsys, "train", *words)
    assert sorted(here.rglob("*")) == before


def test_prepare_and_tokenizer_reject(here: Path, capsys: Capture) -> None:
    before = sorted(here.rglob("*"))
    assert "full" in rejection(capsys, "prepare", "good.jsonl", "--out", "full")
    assert "0.5" in rejection(capsys, "prepare", "good.jsonl", "--out", "o", "--val-fraction", "2")
    assert "missing" in rejection(capsys, "prepare", "missing", "--out", "o")
    assert "--out" in rejection(capsys, "tokenizer", "train", "good.jsonl")
    assert "--tokenizer DIR" in rejection(capsys, "tokenizer", "encode", "good.jsonl")
    garbage = ["--tokenizer", "twice.yaml"]
    assert "twice.yaml" in rejection(capsys, "tokenizer", "encode", "good.jsonl", *garbage)
    assert sorted(here.rglob("*")) == before


def test_more_processes_than_memory_are_not_started(here: Path, capsys: Capture) -> None:
    for words in (["doctor", "--processes"], ["train", "good.jsonl", "--parallel.processes"]):
        assert "must be at most" in rejection(capsys, *words, "1000000")


def test_strict_stops_at_the_first_bad_record(here: Path, capsys: Capture) -> None:
    Path("bad.jsonl").write_bytes(Path("good.jsonl").read_bytes() + b'{"text": 5}\nnot json\n')
    assert "bad.jsonl" in rejection(capsys, "prepare", "bad.jsonl", "--out", "o", "--strict")
    assert not Path("o").exists()
    assert main(["prepare", "bad.jsonl", "--out", "o"]) == 0
    report = json.loads(Path("o/report.json").read_text())
    assert "not json" not in json.dumps(report["n_tokens"])
    assert (
        sum(report["n_problems"].values() if isinstance(report.get("n_problems"), dict) else [2])
        == 2
    )


def test_paths_that_are_not_models_are_rejected(
    here: Path, capsys: Capture, finished_run: Path
) -> None:
    run = str(finished_run)
    assert "no model at" in rejection(capsys, "generate", "missing")
    assert "neither a run directory" in rejection(capsys, "generate", "empty")
    assert "binary.txt is not a model; a model must be" in rejection(capsys, "next", "binary.txt")
    for command, flag in (("generate", "--prompt"), ("evaluate", "--text"), ("next", "--prompt")):
        message = rejection(capsys, command, run, "the sea")
        assert f"a value must follow its option, such as {flag}" in message
    assert "--help" in rejection(capsys, "report", run, "the sea")
    for words in (["import", "of/the-hub", "--out", "new"], ["next", "of/the-hub"]):
        assert "must be downloaded first (hf download" in rejection(capsys, *words)
    for command in ("finetune", "fine-tune", "sft"):
        assert "did you mean 'train --train.init_from" in rejection(capsys, command, run)
    assert "missing.txt" in rejection(capsys, "evaluate", run, "--text", "missing.txt")
    assert "top-p is 3.0" in rejection(capsys, "generate", run, "--top-p", "3")
    assert "at least 1" in rejection(capsys, "generate", run, "--max-tokens", "0")
    assert "temperature is -1.0" in rejection(capsys, "generate", run, "--temperature", "-1")
    assert "at least 1" in rejection(capsys, "next", run, "--top", "0")
    shutil.copytree(finished_run, "run")
    shutil.rmtree("run/checkpoints")
    Path("run/summary.json").unlink()
    assert "no checkpoint yet" in rejection(capsys, "generate", "run")


def test_a_flipped_bit_in_the_weights_is_reported_before_they_are_used(
    here: Path, capsys: Capture, finished_run: Path
) -> None:
    shutil.copytree(finished_run, "run")
    for checkpoint in list_checkpoints(Path("run/checkpoints")):
        file = checkpoint / "model-00000.safetensors"
        data = bytearray(file.read_bytes())
        data[-100] ^= 16
        file.write_bytes(data)
    assert "was changed after it was written" in rejection(capsys, "generate", "run")
    Path("run/summary.json").unlink()
    assert "nothing can be resumed" in rejection(capsys, "train", "--resume", "--run", "run")


def test_characters_that_the_vocabulary_lacks_are_reported(here: Path, capsys: Capture) -> None:
    words = ["good.jsonl", "--tokenizer.name", "characters", *STEPS, "--run", "run"]
    tiny = [w for w in TINY if w not in ("--tokenizer.vocab_size", "400")]
    assert main(["train", *words, *tiny]) == 0
    assert "U+1F600" in rejection(capsys, "generate", "run", "--prompt", "a 😀")


def test_a_full_disk_is_exit_code_75(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **keywords: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pretrain.checkpoint.save.write_tensors", full)
    message = rejection(capsys, "train", "good.jsonl", *TINY, *STEPS, "--run", "run", code=75)
    assert "No space left" in message
    assert list_checkpoints(Path("run/checkpoints")) == []


@pytest.mark.parametrize("command", ["train", "prepare"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("a.txt", "The ship sails.\n" * 99), ("a.jsonl", '{"text": "A ship."}\n' * 99)],
)
def test_a_disk_that_is_too_small_for_the_text_is_named_before_it_is_read(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str, name: str, text: str
) -> None:
    disk = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk._replace(free=900))
    monkeypatch.setenv("PRETRAIN_CACHE", str(here / "cache"))
    (here / name).write_text(text)
    options = ["--out", "out"] if command == "prepare" else [*TINY, *STEPS, "--run", "run"]
    message = rejection(capsys, command, name, *options, code=75)
    assert "preparing this text (--out or PRETRAIN_CACHE) needs " in message
    assert " bytes, but only 900 are free" in message
    assert not list(here.glob("**/read"))


def test_bugs_are_exit_code_1(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def broken(*args: Any, **keywords: Any) -> None:
        json.loads("{")  # a ValueError from inside a library is not the user's

    monkeypatch.setattr("pretrain.parallel.model.ParallelModel.compute_gradients", broken)
    assert main(["train", "good.jsonl", *TINY, *STEPS, "--run", "run"]) == 1
    assert "Traceback" in capsys.readouterr().err
