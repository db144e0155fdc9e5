"""The promises of docs/explanation/exactness.md about numbers, signals and damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.load import list_checkpoints
from pretrain.cli import main
from pretrain.config import compose, read_file
from pretrain.train import loop
from runs import (
    DROPOUT,
    assert_same_run,
    losses,
    records,
    stop_after,
    train,
    weights,
)
from tiny import TINY


@pytest.mark.parametrize("rows", [1, 3, 5, 8])
def test_r0_order_does_not_depend_on_micro_batch(corpus: Path, tmp_path: Path, rows: int) -> None:
    """3 and 5 do not divide the 8 windows of a batch: missing rows weigh nothing."""
    args = ["train", str(corpus), *TINY, *DROPOUT, "--train.steps", "6"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run, micro in ((whole, 8), (parts, rows)):
        assert main([*args, "--train.micro_batch_rows", str(micro), "--run", str(run)]) == 0
    ids = [[r["ids"] for r in records(run) if r["kind"] == "train"] for run in (whole, parts)]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 6
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_r1_two_runs_of_one_config_have_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    one, other, third = tmp_path / "one", tmp_path / "other", tmp_path / "third"
    args = ["train", str(corpus), *TINY, *DROPOUT, "--train.steps", "6"]
    assert main([*args, "--run", str(one)]) == 0
    torch.manual_seed(12345)  # torch's own generator is not used
    torch.rand(7)
    assert main(["train", str(one / "config.yaml"), "--run", str(other)]) == 0
    assert_same_run(one, other)
    assert main([*args, "--train.seed", "2", "--run", str(third)]) == 0
    assert losses(third) != losses(one)


@pytest.mark.parametrize(
    ("number", "evaluation_of"),
    [(signal.SIGTERM, 8), (signal.SIGINT, 12), (signal.SIGHUP, 8)],
)
def test_signal_during_evaluation_loses_neither_step_nor_evaluation(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    evaluation_of: int,
) -> None:
    """It is broken off, the step is saved, and the resume begins with that evaluation, also with
    the last one."""
    args = [str(corpus), *TINY, *DROPOUT, "--train.steps", "12", "--train.evaluate_every", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*args, "--run", str(whole)) == 0

    from pretrain.train import eval_hooks as evaluation

    real, calls = evaluation.score_batches, 0  # type: ignore[attr-defined]

    def disturbed(lm_loss: Any, micro_batches: Any, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != evaluation_of // 2:  # the second half of it
            return real(lm_loss, micro_batches, **rest)
        os.kill(os.getpid(), number)
        left = list(micro_batches)
        assert left == []  # an evaluation may take longer than the time that is given
        return real(lm_loss, left, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "score_batches", disturbed)
        assert train(*args, "--run", str(parts)) == 128 + number
    done = [r["step"] for r in records(parts) if r["kind"] == "evaluate"]
    assert done == list(range(4, evaluation_of, 4))
    assert list_checkpoints(parts / "checkpoints")[-1].name == f"step-{evaluation_of:08d}"
    assert not (parts / "summary.json").exists()
    assert train("--resume", "--run", str(parts)) == 0
    assert_same_run(whole, parts)


def test_signal_after_last_step_stops_at_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [str(corpus), *TINY, "--train.steps", "6"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*args, "--run", str(whole)) == 0

    def counting(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it was to stop")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "measure_baselines", counting)
        assert train(*args, "--run", str(parts)) == 143
    assert not (parts / "summary.json").exists()
    assert train("--resume", "--run", str(parts)) == 0
    assert_same_run(whole, parts)


@pytest.mark.parametrize("stage", ["preparing", "deciding"])
def test_run_killed_before_its_config_was_resolved_is_resumed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Killed, not stopped: an exception would take the folder back, as it does for wrong args."""
    args = [str(corpus), *TINY, "--train.steps", "4", "--run", str(tmp_path / "run")]
    before = os.fork()
    if before == 0:
        from pretrain.runner import start

        name = {"preparing": "open_text", "deciding": "open_world_of"}[stage]
        setattr(start, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        main(["train", *args])
        os._exit(9)
    assert os.WTERMSIG(os.waitpid(before, 0)[1]) == signal.SIGKILL
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"requested.yaml", "run.lock"}
    assert train("--resume", "--run", str(tmp_path / "run")) == 0
    config = compose([read_file(tmp_path / "run" / "config.yaml")])
    assert config.train.steps == 4
    assert not (tmp_path / "run" / "requested.yaml").exists()
    assert train(*args) == 2  # it is a run now


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 steps that was stopped after 7."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    args = [*TINY, "--train.steps", "9", "--train.evaluate_every", "3"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 7)
        assert train(str(corpus), *args, "--run", str(run)) == 143
    return run


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("metrics.jsonl", "--accept metrics"),
        ("samples.jsonl", "--accept samples"),
        ("environment.json", "environment.json is damaged"),
        ("config.yaml", "config.yaml"),
        ("tokenizer/tokenizer.json", None),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "emptied", "random bytes"])
def test_damaged_file_of_a_run_is_reported_and_not_used(
    stopped: Path, tmp_path: Path, capsys: Any, name: str, expected: str | None, damage: str
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    content = (run / name).read_bytes()
    bad = {"cut": content[: len(content) // 2], "emptied": b"", "random bytes": bytes(range(256))}
    (run / name).write_bytes(bad[damage])
    capsys.readouterr()
    code = train("--resume", "--run", str(run))
    output = capsys.readouterr()
    if expected is not None:
        assert code == 2
        # An empty config is one: all its settings differ from the checkpoint's.
        assert expected in output.err or (name == "config.yaml" and "have changed" in output.err)
    else:  # the text has another copy
        assert code == 0
        assert "is written again" in output.out
        assert (run / name).read_bytes() == content


def test_model_is_not_opened_with_another_tokenizer(
    finished_run: Path, tmp_path: Path, capsys: Any
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    file = run / "tokenizer" / "tokenizer.json"
    args = json.loads(file.read_text())
    merges = args["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    file.write_text(json.dumps(args))
    assert main(["next", str(run), "--prompt", "The"]) == 2
    assert "is not the tokenizer that step-00000012 was trained with" in capsys.readouterr().err


def test_accepted_log_needs_no_second_accept(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    (run / "metrics.jsonl").write_text("".join(lines[2:]))
    assert train("--resume", "--run", str(run)) == 2
    assert train("--resume", "--run", str(run), "--accept", "metrics") == 0
    assert [r["step"] for r in records(run) if r["kind"] == "train"][-1] == 9


@pytest.mark.slow
def test_resume_without_the_compiler_cache_has_the_same_bits(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    cache = tmp_path / "compiled"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    args = [str(corpus), *TINY, *DROPOUT, "--train.steps", "8", "--train.evaluate_every", "4"]
    args += ["--train.compile", "on"]

    def run(*more: str) -> int:
        command = [sys.executable, "-m", "pretrain", *more]
        return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL).returncode

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("train", *args, "--run", str(whole)) == 0
    assert any(cache.iterdir())
    copied = shutil.copytree(whole, parts)
    for name in ("summary.json", "baselines.json"):
        (copied / name).unlink()
    shutil.rmtree(copied / "checkpoints" / "step-00000008")
    shutil.rmtree(cache)
    assert run("train", "--resume", "--run", str(parts)) == 0
    assert any(cache.iterdir())
    assert_same_run(whole, parts)
    assert weights(whole)
