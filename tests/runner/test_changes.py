"""A resume under other conditions: every difference is reported and accepted by name, and a process
that is killed between two files loses nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from changed_runs import Killed, config_of, error_of, kill, learning_rates, resume
from pretrain.checkpoint.load import list_checkpoints
from pretrain.cli import main
from pretrain.run.identity import differences, read_records
from pretrain.runner import checks, start
from pretrain.runner.checks import load_previous, read_run_config, settings_of
from pretrain.runner.open import load_model
from pretrain.train import state
from runs import assert_same_run, stop_after

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
CopyRun = Callable[..., Path]


def test_error_names_the_word_that_accepts_each_difference(
    stopped: Path, copy_run: CopyRun, capsys: Capture, monkeypatch: Patch
) -> None:
    run = copy_run(stopped)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr("pretrain.run.identity.code_hash", lambda: "another")
    resume_args = ["train", "--resume", "--run", str(run)]
    settings = ["--optimizer.clip", "2", "--train.threads", "2"]
    error = error_of(capsys, *resume_args, *settings)
    for line in (
        "optimizer.clip: 1.0 -> 2.0   (--accept optimizer.clip)",
        "threads: 1 -> 2   (--accept threads)",
        "-> another   (--accept code)",
    ):
        assert line in error
    error = error_of(capsys, *resume_args, *settings, "--accept", "threads")
    assert "threads: 1 -> 2   (accepted)" in error
    error = error_of(capsys, *resume_args, "--accept", "torch")
    assert "--accept torch: that has not changed; changed: code" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_some_changes_cannot_be_accepted(stopped: Path, capsys: Capture) -> None:
    error = error_of(
        capsys,
        *("train", "--resume", "--run", str(stopped)),
        *"--train.steps 9 --train.seed 2 --train.batch_tokens 512 --model.d_model 64".split(),
        *"--optimizer.name muon --accept train.seed --accept train.steps".split(),
    )
    for name in ("train.steps", "train.seed", "train.batch_tokens", "model.d_model"):
        line = next(line for line in error.splitlines() if line.startswith(f"  {name}: "))
        assert "(cannot be accepted: " in line
    assert "pretrain extend RUN --train.steps N, or pretrain anneal" in error
    assert "--accept must come with --resume" in error_of(capsys, "train", "--accept", "threads")


def test_other_text_is_rejected_before_it_is_prepared(
    stopped: Path, copy_run: CopyRun, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, other = copy_run(stopped), tmp_path / "other.jsonl"
    other.write_bytes(corpus.read_bytes().replace(b"the", b"then"))
    args = ["train", "--resume", "--run", str(run), "--data.source", str(other)]
    assert "(--accept data.source)" in error_of(capsys, *args)
    prepared = Path(os.environ["PRETRAIN_CACHE"]) / "prepared"
    before = set(prepared.iterdir())
    assert "(--accept data.source)" in error_of(capsys, *args)
    assert set(prepared.iterdir()) == before
    # The other text has its own tokenizer of the same size: other ids, which must be accepted too.
    args += ["--accept", "data.source"]
    error = error_of(capsys, *args)
    assert "held-out text: " in error
    assert "(--accept tokenizer)" in error
    assert main([*args, "--accept", "tokenizer"]) == 0
    recorded = [line["what"] for line in read_records(run)]
    assert recorded == ["data.source", "held-out-text", "tokenizer", "training-text"]
    assert config_of(run)["data"]["source"] == str(other)
    tokenizer = (run / "tokenizer" / "tokenizer.json").read_bytes()
    assert tokenizer != (stopped / "tokenizer" / "tokenizer.json").read_bytes()


def test_tokenizer_of_another_size_cannot_be_accepted(
    stopped: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    tokenizer, prepared = str(tmp_path / "tokenizer"), str(tmp_path / "prepared")
    assert main(["tokenizer", "train", str(corpus), "--vocab-size", "300", "--out", tokenizer]) == 0
    assert main(["prepare", str(corpus), "--tokenizer", tokenizer, "--out", prepared]) == 0
    args = ["train", "--resume", "--run", str(stopped), "--data.source", prepared]
    args += ["--accept", "data.source", "--accept", "tokenizer"]
    error = error_of(capsys, *args, "--tokenizer.vocab_size", "300")
    assert "vocab_size: 400 -> 300   (cannot be accepted: the model has a row" in error
    error = error_of(capsys, *args)
    assert "(cannot be accepted: the model has a row for each of 400 tokens" in error


def test_accepted_changes_are_recorded_and_not_reported_again(
    stopped: Path, copy_run: CopyRun, capsys: Capture, monkeypatch: Patch
) -> None:
    run = copy_run(stopped)
    monkeypatch.setattr("pretrain.run.identity.code_hash", lambda: "another")
    args = ["--optimizer.clip", "2", "--accept", "optimizer.clip", "--accept", "code"]
    with monkeypatch.context() as patch:
        # Before the first step, and so before a checkpoint that has the changes.
        patch.setattr("pretrain.parallel.model.ParallelModel.compute_gradients", kill)
        with pytest.raises(Killed):
            resume(run, *args)
    output = capsys.readouterr().out
    assert "accepted from step 3 on: optimizer.clip: 1.0 -> 2.0" in output
    assert config_of(run)["optimizer"]["clip"] == 2.0
    recorded = read_records(run)
    assert [(line["step"], line["what"], line["new"]) for line in recorded] == [
        (3, "code", "another"),
        (3, "optimizer.clip", 2.0),
    ]
    assert {"old", "time", "by"} <= set(recorded[0])
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert resume(run, *args) == 143
    assert resume(run) == 0
    assert read_records(run) == recorded


@pytest.mark.parametrize(
    "killed_before", ["run.identity.write_records", "runner.checks.replace_file"]
)
def test_kill_while_a_change_is_written_loses_nothing(
    stopped: Path, copy_run: CopyRun, monkeypatch: Patch, killed_before: str
) -> None:
    args = ["--schedule.final_fraction", "0.5", "--accept", "schedule.final_fraction"]
    uninterrupted, killed = copy_run(stopped, "uninterrupted"), copy_run(stopped, "killed")
    assert resume(uninterrupted, *args) == 0
    with monkeypatch.context() as patch:
        patch.setattr(f"pretrain.{killed_before}", kill)
        with pytest.raises(Killed):
            resume(killed, *args)
    assert resume(killed, *args) == 0
    assert_same_run(uninterrupted, killed)
    assert config_of(uninterrupted) == config_of(killed)
    assert len(read_records(uninterrupted)) == len(read_records(killed)) == 2


def test_a_change_that_was_recorded_by_a_killed_resume_is_not_damage(
    stopped: Path, copy_run: CopyRun, monkeypatch: Patch
) -> None:
    run = copy_run(stopped)
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.runner.checks.replace_file", kill)
        with pytest.raises(Killed):
            resume(run, "--train.precision", "bf16", "--accept", "train.precision")
    assert load_model(run, device="cpu").precision == "fp32"
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("precision: fp32", "precision: auto"))
    with pytest.raises(ValueError, match="changed or damaged"):
        load_model(run, device="cpu")


def test_changed_learning_rate_is_used_from_its_step_on(
    stopped: Path, finished: Path, copy_run: CopyRun, capsys: Capture, monkeypatch: Patch
) -> None:
    run = copy_run(stopped)
    args = ["--optimizer.learning_rate", "1e-3", "--accept", "optimizer.learning_rate"]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert resume(run, *args) == 143
    output = capsys.readouterr().out
    assert output.index("learning rates, old and new") < output.index("resuming")
    (segment,) = config_of(run)["schedule"]["history"]
    assert (segment["until_step"], segment["learning_rate"], segment["steps"]) == (3, 3e-3, 8)
    # Without both newer checkpoints, the steps that are taken again have their old learning rates.
    for checkpoint in list_checkpoints(run / "checkpoints"):
        if checkpoint.name != "step-00000003":
            shutil.rmtree(checkpoint)
    shutil.copytree(stopped / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    assert resume(run) == 0
    old = learning_rates(finished)
    assert learning_rates(run)[:3] == old[:3]
    assert learning_rates(run)[3:] == pytest.approx([lr / 3 for lr in old[3:]])


def test_edited_config_file_is_a_difference(
    stopped: Path, copy_run: CopyRun, capsys: Capture
) -> None:
    run = copy_run(stopped)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("steps: 8\n", "steps: 16\n"))
    error = error_of(capsys, "train", "--resume", "--run", str(run))
    assert "train.steps: 8 -> 16   (cannot be accepted: the learning rates depend on" in error


def test_setting_that_only_one_version_has_is_not_a_change() -> None:
    changes = differences({"a.b": 1, "code": "x"}, {"a.c": 2, "code": "y", "first weights": "z"})
    assert [change.name for change in changes] == ["code", "first weights"]
    assert changes[1].word == "first-weights"


@pytest.mark.parametrize(("z_loss", "n_changes"), [(0.0, 0), (1e-4, 1)])
def test_setting_that_is_newer_than_the_run_is_compared_with_its_default(
    stopped: Path, z_loss: float, n_changes: int
) -> None:
    stored = read_run_config(stopped)
    settings = settings_of(stored)
    assert settings.pop("train.z_loss") == 0  # as if the run were older than the field
    previous = load_previous(
        stopped, stored, None, started_with={"settings": settings}, command="resume"
    )
    requested = replace(stored, train=replace(stored.train, z_loss=z_loss))
    changes = differences(previous.values, settings_of(requested))
    assert len(changes) == n_changes, changes


def test_resume_makes_the_listed_checks_in_their_order(
    stopped: Path, copy_run: CopyRun, monkeypatch: Patch
) -> None:
    run = copy_run(stopped)
    called: list[str] = []

    def recorded(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **keywords: object) -> object:
            called.append(name)
            return function(*args, **keywords)

        return call

    while_loading = ("check_disk", "restore", "load_log")
    listed = [check.__name__ for check in checks.RESUME_CHECKS]
    for name in [*listed, "write_changes"]:
        place = start if hasattr(start, name) else checks
        monkeypatch.setattr(place, name, recorded(name, getattr(place, name)))
    for name in while_loading:
        monkeypatch.setattr(state.Run, name, recorded(name, getattr(state.Run, name)))
    assert resume(run) == 0
    only_if_finished = "check_finished_run"
    expected = [name for name in listed if name != only_if_finished]
    assert list(dict.fromkeys(called)) == [*expected, *while_loading, "write_changes"]
    called.clear()
    assert resume(run) == 0
    assert called == listed[: listed.index(only_if_finished) + 1]
