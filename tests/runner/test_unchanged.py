"""What the numbers of a run depend on is compared wherever it is opened: a change is named before
it changes a number, and what a run no longer needs may be gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exports import run_json
from pretrain.cli import main
from pretrain.runner.open import load_model
from pretrain.runner.text import cache_folder
from runs import assert_same_run, records, train
from tiny import write_llama

Capture = pytest.CaptureFixture[str]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new), encoding="utf-8")


def error_of(capsys: Capture, *args: str, code: int = 2) -> str:
    """Run a command that fails, and return its message."""
    capsys.readouterr()
    assert main([*args]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error, error
    return error


def without_last_step(run: Path) -> Path:
    """Make of a finished run of 8 steps one that was killed after step 8, with a checkpoint of
    step 4."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints/step-00000008")
    return run


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("norm_epsilon: 1.0e-05", "norm_epsilon: 3.0e-05"),
        ("n_heads: 2", "n_heads: 4"),
        ("precision: fp32", "precision: bf16"),
        ("device: cpu", "device: auto"),
    ],
)
def test_a_changed_setting_of_the_model_is_named(
    finished: Path, copy_run: Callable[..., Path], old: str, new: str
) -> None:
    run = copy_run(finished)
    load_model(run, device="cpu")
    edit(run / "config.yaml", old, new)
    with pytest.raises(ValueError, match=rf"config.yaml is not that of the run.*{old[:6]}"):
        load_model(run, device="cpu")


@pytest.mark.parametrize(
    "words",
    [
        "evaluate RUN --text TEXT",
        "generate RUN",
        "next RUN",
        "ask RUN --task translate-en-fr --input sea",
        "export RUN --format hf --out OUT",
        "compare RUN WHOLE --text TEXT",
        "trace RUN --step 3",
        "train TEXT --train.init_from RUN --train.steps 2 --run OUT",
    ],
)
def test_every_command_names_a_changed_config(
    finished: Path, copy_run: Callable[..., Path], corpus: Path, capsys: Capture, words: str
) -> None:
    run = copy_run(finished)
    edit(run / "config.yaml", "context_length: 32", "context_length: 16")
    places = {"RUN": run, "WHOLE": finished, "TEXT": corpus, "OUT": run.parent / "out"}
    error = error_of(capsys, *(str(places.get(word, word)) for word in words.split()))
    assert f"{run / 'config.yaml'} is not that of" in error
    assert "model.context_length: 32 -> 16" in error


def test_a_changed_imported_model_is_named(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "hf").mkdir()
    write_llama(tmp_path / "hf", context_length=32)
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "model")]) == 0
    for file, old, new in (
        ("config.yaml", "rope_theta: 10000.0", "rope_theta: 10002.0"),
        ("config.yaml", "precision: auto", "precision: bf16"),
        ("tokenizer/tokenizer.json", '"b":66,"c":67', '"b":67,"c":66'),
    ):
        model = Path(shutil.copytree(tmp_path / "model", tmp_path / "copy"))
        load_model(model, device="cpu")
        edit(model / file, old, new)
        with pytest.raises(
            ValueError, match=rf"{file.split('/')[0]}.* is not th.* changed or damaged"
        ):
            load_model(model, device="cpu")
        shutil.rmtree(model)
    assert "was not trained here" in error_of(capsys, "evaluate", str(tmp_path / "model"))


def test_an_accepted_precision_is_that_of_the_run(
    stopped: Path, copy_run: Callable[..., Path]
) -> None:
    run = copy_run(stopped)
    accept = ["--train.precision", "bf16", "--accept", "train.precision"]
    accept += ["--train.keep_checkpoints", "9", "--accept", "train.keep_checkpoints"]
    assert train("--resume", "--run", str(run), *accept) == 0
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert checkpoints[0].name == "step-00000003"  # saved in fp32
    for path in (run, *checkpoints):
        assert load_model(path, device="cpu").precision == "bf16"


def test_steps_taken_again_must_read_the_same_ids(
    finished: Path, copy_run: Callable[..., Path], capsys: Capture
) -> None:
    run = without_last_step(copy_run(finished))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        record = json.loads(line)
        if (record["kind"], record["step"]) == ("train", 6):
            lines[number] = json.dumps({**record, "ids": record["ids"] + 1}) + "\n"
    (run / "metrics.jsonl").write_text("".join(lines))
    for _ in range(2):
        error = error_of(capsys, "train", "--resume", "--run", str(run))
        assert "step 6 has read other ids than before the resume" in error
        assert [r["step"] for r in records(run) if r["kind"] == "train"] == [1, 2, 3, 4, 5]


def test_steps_taken_again_may_read_other_ids_after_an_accepted_change(
    finished: Path, copy_run: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    run = without_last_step(copy_run(finished))
    text = corpus.read_text(encoding="utf-8")
    (tmp_path / "other.jsonl").write_text("".join(text.splitlines(keepends=True)[::-1]))
    accept = ["--data.source", str(tmp_path / "other.jsonl"), "--accept", "data.source"]
    assert train("--resume", "--run", str(run), *accept) == 0
    assert records(run) != records(finished)


def test_flipped_ids_are_named_by_a_resume_and_an_evaluation(
    finished: Path,
    copy_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    run = copy_run(finished)
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    assert main(["evaluate", str(run)]) == 0
    (folder,) = (path.parent for path in tmp_path.glob("cache/prepared/*/manifest.json"))
    for name, args in (
        ("val.bin", ["evaluate", str(run)]),
        ("train.bin", ["train", "--resume", "--run", str(without_last_step(copy_run(run, "cut")))]),
        ("train.offsets", ["trace", str(run), "--step", "2"]),
        ("train.documents.jsonl", ["trace", str(run), "--step", "2"]),
    ):
        content = (folder / name).read_bytes()
        flipped = bytearray(content)
        flipped[-2] ^= 1
        (folder / name).write_bytes(flipped)
        try:
            error = error_of(capsys, *args)
        finally:
            (folder / name).write_bytes(content)
        assert f"{folder / name} is damaged: its " in error
        assert "delete the prepared folder" in error


def test_a_damaged_cached_text_is_set_aside_and_prepared_again(
    corpus: Path, tmp_path: Path, short_settings: list[str], capsys: Capture
) -> None:
    text = Path(shutil.copy(corpus, tmp_path / "own.jsonl"))
    before = {*(cache_folder() / "prepared").glob("*")}
    start = ["train", str(text), *short_settings, "--train.steps", "2", "--run"]
    assert main([*start, str(tmp_path / "whole")]) == 0
    (folder,) = {*(cache_folder() / "prepared").iterdir()} - before
    for n, (name, size) in enumerate(
        [
            ("manifest.json", None),
            ("manifest.json", 100),
            ("train.bin", 100),
            ("val.offsets", 0),
            ("tokenizer/tokenizer.json", 50),
            ("train.documents.jsonl", None),
        ]
    ):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        if size is not None:
            (folder / name).write_bytes(content[:size])
        capsys.readouterr()
        assert main([*start, str(tmp_path / str(n))]) == 0
        assert_same_run(tmp_path / "whole", tmp_path / str(n))
        output = capsys.readouterr()
        (damaged,) = folder.parent.glob(f"damaged-{folder.name}-*")
        assert f"the damaged folder is {damaged}" in output.out + output.err
        shutil.rmtree(damaged)


def test_an_error_in_the_config_does_not_set_a_cached_text_aside(
    corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    paths = (corpus, shutil.copy(corpus, tmp_path / "again.jsonl"))  # all of it are duplicates
    sources = "[" + ", ".join(f"{{path: '{path}', weight: 1}}" for path in paths) + "]"
    for n in range(2):
        start = ["train", "--run", str(tmp_path / str(n)), "--data.source", sources]
        error = error_of(capsys, *start, "--tokenizer.name", "bytes", "--train.steps", "2")
        assert "again.jsonl' has no text left to train on" in error
    assert not [*(cache_folder() / "prepared").glob("damaged-*")]


def test_a_run_goes_on_without_the_model_and_the_text_it_started_from(
    finished: Path, copy_run: Callable[..., Path], corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    source = copy_run(finished, "source")
    text = Path(shutil.copy(corpus, tmp_path / "first.jsonl"))
    args = [str(text), "--train.init_from", str(source), "--train.steps", "8"]
    args += ["--train.batch_tokens", "256", "--train.evaluate_every", "4", "--train.device", "cpu"]
    run = tmp_path / "run"
    assert train(*args, "--run", str(run)) == 0
    cut = without_last_step(copy_run(run, "cut"))
    shutil.rmtree(source)
    text.rename(tmp_path / "second.jsonl")
    shutil.rmtree(cache_folder() / "prepared")
    error = error_of(capsys, "train", str(tmp_path / "second.jsonl"), "--resume", "--run", str(cut))
    assert error.count("--accept") == 1, error
    resume = [str(tmp_path / "second.jsonl"), "--resume", "--run", str(cut)]
    assert train(*resume, "--accept", "data.source") == 0
    assert_same_run(run, cut)
    assert main(["extend", str(cut), "--train.steps", "14"]) == 0
    assert run_json(capsys, "evaluate", str(cut))["text"]


@pytest.mark.parametrize(
    "line", [b'{"step": 8, "wh', b"\xff\xfe\n", b"[]\n", b'{"step": "x"}\n', b'{"step": 1}\n']
)
def test_a_damaged_record_of_changes_is_named(
    finished: Path, copy_run: Callable[..., Path], capsys: Capture, line: bytes
) -> None:
    run = copy_run(finished)
    (run / "changes.jsonl").write_bytes(line)
    for args in (
        ["extend", str(run), "--train.steps", "12"],
        ["trace", str(run), "--step", "3"],
        ["next", str(run)],
    ):
        assert f"{run / 'changes.jsonl'}, line 1, is damaged: it must have" in error_of(
            capsys, *args
        )


@pytest.mark.parametrize(
    "content", [b"", b"[", b"{}", b"\xff", b'{"steps": [], "checkpoint": "x"}', b'{"steps": 8}']
)
def test_a_damaged_summary_is_named(
    finished: Path, copy_run: Callable[..., Path], capsys: Capture, content: bytes
) -> None:
    run = copy_run(finished)
    (run / "summary.json").write_bytes(content)
    for args in (["extend", str(run), "--train.steps", "12"], ["next", str(run)]):
        assert f"{run / 'summary.json'} is damaged: " in error_of(capsys, *args)
    (run / "summary.json").unlink()
    assert train("--resume", "--run", str(run)) == 0
    assert main(["next", str(run)]) == 0


def test_an_empty_config_is_named(
    finished: Path, copy_run: Callable[..., Path], capsys: Capture
) -> None:
    run = copy_run(finished)
    (run / "config.yaml").write_text("")
    for args in (
        ["extend", str(run), "--train.steps", "12"],
        ["train", "--resume", "--run", str(run)],
        ["trace", str(run), "--step", "2"],
    ):
        assert f"{run / 'config.yaml'} is damaged: it must have tr" in error_of(capsys, *args)


@pytest.mark.parametrize("line", [b'{"kind": "train", "step": []}\n', b'{"step": 1}\n', b"[]\n"])
def test_damaged_lines_of_the_log_are_left_out(
    finished: Path, copy_run: Callable[..., Path], line: bytes
) -> None:
    run = copy_run(finished)
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(content + line)
    for args in (["trace", str(run), "--document", "1"], ["report", str(run)]):
        assert main(args) in (0, 2)
    assert main(["extend", str(run), "--train.steps", "12"]) == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"run": 5, "fingerprint": {}}',
        b'{"run": "x", "fingerprint": {"training text": 5}}',
        b'{"run": "x", "fingerprint": {"training text": "5", "settings": 1}}',
    ],
)
def test_a_damaged_environment_is_named(
    finished: Path, copy_run: Callable[..., Path], capsys: Capture, content: bytes
) -> None:
    run = copy_run(finished)
    (run / "environment.json").write_bytes(content)
    for args in (["extend", str(run), "--train.steps", "12"], ["trace", str(run), "--step", "3"]):
        assert f"{run / 'environment.json'} is damaged: " in error_of(capsys, *args)
