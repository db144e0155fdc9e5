"""extend and anneal: a finished run gets more steps under a schedule that is printed first, and a
process that is killed between two files loses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from changed_runs import Killed, config_of, error_of, kill, learning_rates, resume
from pretrain.checkpoint.load import list_checkpoints
from pretrain.cli import main
from pretrain.run.identity import read_records
from runs import assert_same_run, records, stop_after

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
CopyRun = Callable[..., Path]


@pytest.mark.parametrize("stop_at", [1, 6])
def test_stopped_and_resumed_extension_equals_the_uninterrupted_one(
    constant_lr: Path, copy_run: CopyRun, monkeypatch: Patch, stop_at: int
) -> None:
    uninterrupted, stopped = copy_run(constant_lr, "uninterrupted"), copy_run(constant_lr, "stop")
    settings = ["--train.steps", "16", "--schedule.name", "cosine"]
    assert main(["extend", str(uninterrupted), *settings]) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        assert main(["extend", str(stopped), *settings]) == 143
    assert resume(stopped) == 0
    assert_same_run(uninterrupted, stopped)
    assert config_of(uninterrupted) == config_of(stopped)
    assert json.loads((uninterrupted / "summary.json").read_text())["steps"] == 16
    assert json.loads((uninterrupted / "summary.json.1").read_text())["steps"] == 8
    assert (uninterrupted / "baselines.json.1").is_file()
    assert learning_rates(uninterrupted)[:8] == learning_rates(constant_lr)


def test_extend_replays_lost_steps_at_their_original_lr(
    constant_lr: Path, copy_run: CopyRun, monkeypatch: Patch, capsys: Capture
) -> None:
    run = copy_run(constant_lr)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert main(["extend", str(run), "--train.steps", "12", "--schedule.name", "wsd"]) == 143
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(constant_lr / "checkpoints", run / "checkpoints")
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    capsys.readouterr()
    assert resume(run) == 0
    output = capsys.readouterr().out
    assert "after step 4" in output
    assert "note: " not in output
    assert learning_rates(run)[:8] == learning_rates(constant_lr)
    assert len(learning_rates(run)) == 12


def test_config_of_an_extended_run_trains_the_same_run(
    finished: Path, copy_run: CopyRun, tmp_path: Path
) -> None:
    run, again = copy_run(finished), tmp_path / "again"
    assert main(["extend", str(run), "--train.steps", "14"]) == 0
    assert main(["train", str(run / "config.yaml"), "--run", str(again)]) == 0
    losses, losses_again = (
        [line["loss"] for line in records(each) if line["kind"] == "train"] for each in (run, again)
    )
    assert losses == losses_again
    assert learning_rates(run) == learning_rates(again)


def test_extension_is_printed_and_recorded_before_its_first_step(
    finished: Path, copy_run: CopyRun, capsys: Capture
) -> None:
    run = copy_run(finished)
    capsys.readouterr()
    assert main(["extend", str(run), "--train.steps", "16", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["steps"] == 16
    messages = output.err
    table_at, resuming_at = messages.index("old and new"), messages.index("resuming")
    assert table_at < resuming_at < messages.index("step     16/16")
    row = next(line for line in messages.splitlines() if line.startswith("        15 "))
    assert row.split()[1] == "-"
    line = next(line for line in read_records(run) if line["what"] == "extend")
    assert (line["step"], line["old"], line["new"], line["by"]) == (8, 8, 16, "extend")
    assert [row["step"] for row in line["curve"]][-1] == 15
    assert all(row["new"] == learning_rates(run)[row["step"]] for row in line["curve"])
    train, schedule = config_of(run)["train"], config_of(run)["schedule"]
    assert (train["evaluate_every"], train["save_every"]) == (4, 4)
    assert (schedule["origin_step"], schedule["warmup_steps"]) == (8, 2)
    # Once more, from there.
    assert main(["extend", str(run), "--train.steps", "20"]) == 0
    assert (run / "summary.json.2").is_file()
    assert [segment["until_step"] for segment in config_of(run)["schedule"]["history"]] == [8, 16]


def test_anneal_falls_in_a_straight_line_to_zero(
    constant_lr: Path, copy_run: CopyRun, capsys: Capture
) -> None:
    run = copy_run(constant_lr)
    assert main(["anneal", str(run), "--train.steps", "12"]) == 0
    assert learning_rates(run)[:8] == learning_rates(constant_lr)
    expected = [3e-3, 3e-3 * 0.75, 3e-3 * 0.5, 3e-3 * 0.25]
    assert learning_rates(run)[8:] == pytest.approx(expected)
    error = error_of(capsys, "anneal", str(run), "--train.steps", "20")
    assert "has reached 0 already (annealing, final_fraction 0)" in error
    # An extension uses the run's own shape again.
    assert main(["extend", str(run), "--train.steps", "16"]) == 0
    assert learning_rates(run)[-1] == 3e-3


@pytest.mark.parametrize(
    "killed_before",
    [
        "run.identity.write_records",
        "runner.checks.replace_file",
        "run.directory.archive_results",
        "rename",
    ],
)
@pytest.mark.parametrize("continued_by", ["extend", "resume"])
def test_kill_while_an_extension_is_written_loses_nothing(
    finished: Path, copy_run: CopyRun, monkeypatch: Patch, killed_before: str, continued_by: str
) -> None:
    run, settings = copy_run(finished), ["--train.steps", "12"]
    renames = iter([Path.rename, kill])
    with monkeypatch.context() as patch:
        if killed_before == "rename":
            # Between the baselines and the summary.
            patch.setattr(Path, "rename", lambda path, to: next(renames)(path, to))
        else:
            patch.setattr(f"pretrain.{killed_before}", kill)
        with pytest.raises(Killed):
            main(["extend", str(run), *settings])
    was_written = killed_before in ("run.directory.archive_results", "rename")
    if continued_by == "resume":
        assert resume(run) == 0
        if not was_written:  # it was not extended, and is reported as finished
            assert learning_rates(run) == learning_rates(finished)
    is_done = continued_by == "resume" and was_written
    assert main(["extend", str(run), *settings]) == (2 if is_done else 0)
    assert json.loads((run / "summary.json").read_text())["steps"] == 12
    archived = {path.name for path in run.glob("*.json.*")}
    assert archived == {"summary.json.1", "baselines.json.1"}
    assert [line["what"] for line in read_records(run)].count("extend") == 1
    assert resume(run) == 0


def test_extension_by_other_code_has_to_be_accepted(
    finished: Path, copy_run: CopyRun, capsys: Capture, monkeypatch: Patch
) -> None:
    run = copy_run(finished)
    monkeypatch.setattr("pretrain.run.identity.code_hash", lambda: "another")
    args = ["extend", str(run), "--train.steps", "12"]
    assert "-> another   (--accept code)" in error_of(capsys, *args)
    assert config_of(run) == config_of(finished)
    assert main([*args, "--accept", "code"]) == 0
    # Settings other than those of the schedule are changes like any other.
    args = ["extend", str(run), "--train.steps", "16", "--optimizer.clip", "2"]
    assert "(--accept optimizer.clip)" in error_of(capsys, *args)
    assert main([*args, "--accept", "optimizer.clip"]) == 0
    assert config_of(run)["optimizer"]["clip"] == 2.0


def test_errors_of_extend_and_anneal(
    finished: Path, stopped: Path, constant_lr: Path, copy_run: CopyRun, capsys: Capture
) -> None:
    error = error_of(capsys, "extend", str(stopped), "--train.steps", "16")
    assert (
        f"{stopped} must be a finished run, to extend it; finish it first: pretrain train" in error
    )
    error = error_of(capsys, "extend", str(finished), "--train.steps", "8")
    assert "train.steps must be more than the 8 steps" in error
    assert "extend needs --train.steps N" in error_of(capsys, "extend", str(finished))
    error = error_of(capsys, "anneal", str(finished), "--train.steps", "16")
    assert "has reached 0 already (wsd, final_fraction 0)" in error
    assert "pretrain extend" in error
    error = error_of(capsys, "extend", str(finished), "--train.steps", "10")
    assert "train.steps must be at least 11" in error
    args = ["anneal", str(constant_lr), "--train.steps", "9", "--schedule.final_fraction", "1"]
    error = error_of(capsys, *args)
    assert "schedule.final_fraction is 1; it must be below the fraction of the peak" in error
    checkpoint = list_checkpoints(finished / "checkpoints")[-1]
    error = error_of(capsys, "anneal", str(checkpoint), "--train.steps", "16")
    assert "--train.init_from" in error
    run = copy_run(finished)
    (run / "environment.json").unlink()
    assert "was imported" in error_of(capsys, "extend", str(run), "--train.steps", "16")


def test_damaged_last_checkpoint_is_not_replaced_by_an_older_one(
    finished: Path, copy_run: CopyRun, capsys: Capture
) -> None:
    run = copy_run(finished)
    file = run / "checkpoints" / "step-00000008" / "model-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 16
    file.write_bytes(data)
    error = error_of(capsys, "extend", str(run), "--train.steps", "16")
    assert "the checkpoint of its last step is damaged" in error
    assert file.exists()
    assert config_of(run) == config_of(finished)


def test_run_that_patience_stopped_needs_more_patience(
    corpus: Path, tmp_path: Path, capsys: Capture, short_settings: list[str]
) -> None:
    run = tmp_path / "run"
    early = "--train.patience 1 --train.evaluate_every 1 --optimizer.learning_rate 0.5".split()
    assert main(["train", str(corpus), *short_settings, *early, "--run", str(run)]) == 0
    steps = json.loads((run / "summary.json").read_text())["steps"]
    assert steps < 8
    args = ["extend", str(run), "--train.steps", str(steps + 4)]
    assert "add --train.patience 2, or --train.patience null" in error_of(capsys, *args)
    assert main([*args, "--train.patience", "null", "--optimizer.learning_rate", "1e-3"]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == steps + 4


def test_mixture_is_extended_only_if_its_seen_samples_stay(
    corpus: Path, tmp_path: Path, capsys: Capture, short_settings: list[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(corpus.read_bytes().replace(b"the", b"then"))
    for stage, exit_code in (("", 0), (", stage: 0.5", 2)):
        run = tmp_path / f"run{exit_code}"
        source = f"[{{path: {corpus}, weight: 1}}, {{path: {other}, weight: 1{stage}}}]"
        args = ["train", "--data.source", source, *short_settings, "--run", str(run)]
        assert main(args) == 0
        capsys.readouterr()
        assert main(["extend", str(run), "--train.steps", "12"]) == exit_code
    assert "at the samples 0, 32 of 8 steps, but at 0, 48 of 12 steps" in capsys.readouterr().err
