"""A run of `pretrain train`: its files, checkpoints, early stop, kill and resume, bit for bit."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.checkpoint.load import Checkpoint, list_checkpoints
from pretrain.checkpoint.save import save_checkpoint
from pretrain.parallel.config import ParallelConfig
from pretrain.run.log import nats_of_choice
from pretrain.runner.checks import read_run_config
from pretrain.runner.text import prepared_text
from pretrain.train.build import training_batches
from pretrain.train.console import Console, show_plan, show_summary
from pretrain.train.signals import StopSignals
from runs import DROPOUT, Killed, assert_same_run, kill_in_step, records, stop_after, train
from tiny import TINY


def test_run_writes_its_files_and_summary(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    promised = (
        "parameters steps tokens val_nats_per_token val_perplexity val_bits_per_byte "
        "tokens_per_second train_seconds total_seconds peak_memory_bytes checkpoint"
    )
    assert set(promised.split()) <= set(summary)
    assert summary["steps"] == 12
    assert summary["held_out"].keys() == {"copied", "difference", "notes"}
    assert summary["tokens"] == 12 * 256
    assert summary["val_perplexity"] == pytest.approx(math.exp(summary["val_nats_per_token"]))
    assert 0.005 < summary["val_bits_per_byte_stderr"] / summary["val_bits_per_byte"] < 0.05
    names = {p.name for p in finished_run.iterdir()}
    assert names == {
        *"config.yaml tokenizer metrics.jsonl samples.jsonl checkpoints environment.json".split(),
        *"baselines.json predictions.json summary.json report.html".split(),
    }
    losses = [r["loss"] for r in records(finished_run) if r["kind"] == "train"]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3
    assert (finished_run / summary["checkpoint"]).is_dir()


@pytest.mark.parametrize("stop_at", [1, 5, 6, 11])
def test_stopped_and_resumed_run_equals_uninterrupted_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    args = [str(corpus), *TINY, *DROPOUT, "--train.steps", "12", "--train.evaluate_every", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*args, "--run", str(whole)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        assert train(*args, "--run", str(parts)) == 143
    assert not (parts / "summary.json").exists()
    saved = [path.name for path in list_checkpoints(parts / "checkpoints")]
    # Within the first step, which a compiler may need minutes for, there is nothing to save yet.
    assert saved[-1:] == ([] if stop_at == 1 else [f"step-{stop_at:08d}"])
    assert train("--resume", "--run", str(parts)) == 0
    assert_same_run(whole, parts)


def test_killed_run_resumes_from_last_checkpoint_and_truncates_its_log(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [str(corpus), *TINY, "--train.steps", "10", "--train.evaluate_every", "4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(*args, "--run", str(whole)) == 0

    with monkeypatch.context() as patch:
        kill_in_step(patch, 8)
        with pytest.raises(Killed):
            train(*args, "--run", str(killed))
    assert records(killed)[-1]["step"] == 7
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 8, "lo')  # what a crash in a write leaves
    assert train("--resume", "--run", str(killed)) == 0
    assert_same_run(whole, killed)
    cut = (killed / "metrics.jsonl.cut-1").read_text()
    assert '"step": 7' in cut


def test_resume_skips_damaged_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    args = [str(corpus), *TINY, "--train.steps", "10", "--train.evaluate_every", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*args, "--run", str(whole)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert train(*args, "--run", str(parts)) == 143
    file = parts / "checkpoints" / "step-00000007" / "optimizer-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    capsys.readouterr()
    assert train("--resume", "--run", str(parts)) == 0
    output = capsys.readouterr().out
    assert "optimizer-00000.safetensors" in output
    assert "resuming" in output
    assert "after step 4" in output
    assert_same_run(whole, parts)


def test_resume_rejects_other_settings_text_and_code(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_bytes(corpus.read_bytes())
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(str(text), *TINY, "--train.steps", "9", "--run", str(run)) == 143
    resume = ["--resume", "--run", str(run)]
    assert train(*resume, "--train.steps", "11", "--optimizer.clip", "2") == 2
    output = capsys.readouterr().err
    assert "train.steps: 9 -> 11" in output
    assert "optimizer.clip: 1.0 -> 2.0" in output
    text.write_bytes(corpus.read_bytes().replace(b"the", b"then"))
    assert train(*resume) == 2
    assert "training text:" in capsys.readouterr().err
    text.write_bytes(corpus.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.run.identity.code_hash", lambda: "another")
        assert train(*resume) == 2
        assert "code: " in capsys.readouterr().err
    # The run's own command with --resume changes nothing.
    assert train(str(text), *TINY, "--train.steps", "9", *resume) == 0
    assert train(*resume) == 0
    assert "is finished" in capsys.readouterr().out


def test_run_without_checkpoint_is_not_restarted_on_another_text(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text, run = tmp_path / "text.jsonl", tmp_path / "run"
    text.write_bytes(corpus.read_bytes())

    def dying(*args: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.parallel.model.ParallelModel.compute_gradients", dying)
        assert train(str(text), *TINY, "--train.steps", "2", "--run", str(run)) == 130
    text.write_bytes(corpus.read_bytes().replace(b"the", b"then"))
    assert train("--resume", "--run", str(run)) == 2
    assert "training text:" in capsys.readouterr().err
    text.write_bytes(corpus.read_bytes())
    assert train("--resume", "--run", str(run)) == 0
    assert "it starts from scratch" in capsys.readouterr().out


def test_resume_of_finished_run_writes_missing_report(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "report.html").unlink()
    assert train("--resume", "--run", str(run)) == 0
    report = (run / "report.html").read_bytes()
    # The same for a run with the older report of a stop.
    (run / "report.html").write_text("of an earlier stop")
    os.utime(run / "report.html", (0, 0))
    assert train("--resume", "--run", str(run)) == 0
    assert (run / "report.html").read_bytes() == report


def test_milestone_checkpoints_are_kept(corpus: Path, tmp_path: Path) -> None:
    args = [str(corpus), *TINY, "--train.steps", "10", "--train.evaluate_every", "10"]
    args += ["--train.save_every", "5", "--train.keep_checkpoints", "2", "--train.keep_every", "3"]
    assert train(*args, "--run", str(tmp_path / "run")) == 0
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == [f"step-{step:08d}" for step in (3, 6, 9, 10)]


def test_three_failed_saves_in_a_row_end_the_run(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three failures end a run; three that are not in a row do not."""
    failing = {2, 6, 10}

    def save(folder: Path, *, step: int, **rest: Any) -> Path:
        if step in failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_checkpoint(folder, step=step, **rest)

    monkeypatch.setattr("pretrain.checkpoint.save.save_checkpoint", save)
    args = [str(corpus), *TINY, "--train.steps", "12", "--train.save_every", "2"]
    args += ["--train.evaluate_every", "12", "--train.keep_checkpoints", "9"]
    assert train(*args, "--run", str(tmp_path / "run")) == 0
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == [f"step-{step:08d}" for step in (4, 8, 12)]
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("No space left on device; training continues") == 3
    args[args.index("--train.save_every") + 1] = "1"
    failing = {5, 6, 7}
    assert train(*args, "--run", str(tmp_path / "full")) == 75
    assert "free disk space, then: --resume" in capsys.readouterr().err


def test_total_seconds_include_earlier_processes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [str(corpus), *TINY, "--train.steps", "6", "--run", str(tmp_path)]
    real = save_checkpoint

    def save(folder: Path, *, state: dict[str, Any], **rest: Any) -> Path:
        """Pretend that the process worked for 1,000 seconds more."""
        later = {name: state[name] + 1000 for name in ("train_seconds", "total_seconds")}
        return real(folder, state={**state, **later}, **rest)

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.checkpoint.save.save_checkpoint", save)
        stop_after(patch, 3)
        assert train(*args) == 143
    assert train("--resume", "--run", str(tmp_path)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 1000 < summary["train_seconds"] < summary["total_seconds"] < 1200


def test_ctrl_c_saves_and_prints_the_resume_command(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = [sys.executable, "-m", "pretrain", "train", str(corpus), "--run", str(run), *TINY]
    child = subprocess.Popen(
        [*args, "--train.steps", "100000", "--train.evaluate_every", "100000"],
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 2000):
        assert time.monotonic() < deadline, "no metrics after 120 seconds"
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert f"pretrain train --resume --run {run}" in output
    saved = list_checkpoints(run / "checkpoints")[-1]
    assert Checkpoint(saved).step == records(run)[-1]["step"]


def test_diverged_run_suggests_a_lower_lr(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    wild = "--optimizer.learning_rate 1e30 --optimizer.name adamw --optimizer.clip 0".split()
    args = [str(corpus), *TINY, *wild, "--train.steps", "30", "--run", str(tmp_path / "run")]
    assert train(*args) == 2
    assert "a lower optimizer.learning_rate" in capsys.readouterr().err


def test_patience_stops_run_without_improvement(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    args = [str(corpus), *TINY, "--run", str(run), "--train.steps", "60"]
    # A learning rate far too high to improve for long.
    stops = ["--train.patience", "2", "--train.evaluate_every", "2"]
    assert train(*args, *stops, "--optimizer.learning_rate", "0.5") == 0
    summary = json.loads((run / "summary.json").read_text())
    evaluations = [r for r in records(run) if r["kind"] == "evaluate"]
    assert summary["steps"] < 60
    best = min(evaluations, key=lambda r: r["val_nats_per_token"])
    assert evaluations[-1]["step"] == best["step"] + 4
    assert summary["checkpoint"] == f"checkpoints/step-{best['step']:08d}"
    # The same if the run died before it wrote its summary; and where the halves of the held-out
    # text disagree on the best step, what is reported was not chosen by what it is measured on.
    before = records(run)
    (run / "summary.json").unlink()
    for each in evaluations:
        nats = each["val_nats_per_token"] * each["val_tokens"]
        assert sum(each["nats_of_halves"]) == pytest.approx(nats, rel=1e-9)
        assert each["val_tokens"] == 512, "both halves, each window once"
    assert nats_of_choice(before) == 0, "or the next lines show nothing"
    monkeypatch.setattr("pretrain.train.loop.nats_of_choice", lambda records: 1000.0)
    assert train("--resume", "--run", str(run)) == 0
    assert records(run) == before
    again = json.loads((run / "summary.json").read_text())
    assert again["steps"] == summary["steps"]
    n = summary["val_tokens"]
    assert n * again["val_nats_per_token"] == pytest.approx(
        n * summary["val_nats_per_token"] + 1000
    )
    assert again["choice"]["nats"] == 1000
    assert again["choice"]["bits_per_byte"] == summary["val_bits_per_byte"]
    assert again["held_out"] == summary["held_out"]
    for shown in (capsys.readouterr().out, (run / "report.html").read_text()):
        assert "chosen by one half of them and scored on the other" in " ".join(shown.split())


def test_second_signal_stops_at_once() -> None:
    # A shell that starts the tests in the background has SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        assert stop.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_time_left_is_said_early_and_not_after_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is that of the clock: evaluations and checkpoints take time too."""
    output, now = io.StringIO(), 100.0
    monkeypatch.setattr("pretrain.train.console.time.monotonic", lambda: now)
    console = Console(output)
    numbers = {"loss": 2.0, "bits_per_byte": 1.0, "tokens_per_second": 9.0, "learning_rate": 0.1}
    held_out = {"val_nats_per_token": 2.0, "val_bits_per_byte": 1.0}
    with console.progress(steps=1000, step=100):  # of a resumed run
        for step, seconds in ((101, 60.0), (102, 60.0), (150, 48.0), (1000, 900.0)):
            now += seconds
            console.step({"step": step, **numbers}, steps=1000)
            if step >= 150:
                console.evaluation({"step": step, **held_out}, steps=1000, is_best=False)
    lines = [line.rpartition(" | ")[2] for line in output.getvalue().splitlines()]
    assert lines[1] == "14 h 58 min left"
    assert lines[2:4] == ["47 min 36 s left"] * 2
    assert lines[0] == "14 h 59 min left"
    assert lines[4] == "lr 1.0e-01"
    assert "left" not in lines[5]


def test_the_cost_is_divided_into_what_it_was_spent_on(
    finished_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, corpus: Path
) -> None:
    assert train(str(corpus), *TINY, "--train.steps", "2", "--run", str(tmp_path / "run")) == 0
    (cost,) = re.findall(r"  cost .*", capsys.readouterr().out)
    parts = re.findall(r"(training|evaluation|checkpoints|count tables|the rest) [\d.]+ s", cost)
    assert parts == ["training", "evaluation", "checkpoints", "count tables", "the rest"]
    shown = dict(re.findall(r"([a-z ]+) ([\d.]+) s[,)]", cost.partition("(")[2]))
    total = json.loads((tmp_path / "run/summary.json").read_text())["total_seconds"]
    assert sum(map(float, shown.values())) == pytest.approx(total, abs=2.0)


def summary_of_ones() -> dict[str, Any]:
    numbers = "val_bits_per_byte val_bits_per_byte_stderr val_perplexity val_tokens total_seconds"
    keys = [*numbers.split(), "tokens_per_second", "peak_memory_bytes"]
    return dict.fromkeys(keys, 1.0) | {"baselines": [], "checkpoint": "step", "seconds": {}}


@pytest.mark.parametrize(
    ("stderr", "shown"),
    [(0.02, None), (0.0, None), (0.1, "is 10.0 %; --data.val_fraction"), (None, "is unknown; ")],
)
def test_a_large_error_of_the_held_out_loss_is_said(
    stderr: float | None, shown: str | None
) -> None:
    output, summary = io.StringIO(), summary_of_ones() | {"val_bits_per_byte_stderr": stderr}
    show_summary(Console(output), summary, folder=Path("run"), report=Path("r"))
    line, rest = output.getvalue().split("  held-out text  ")[1].split("\n", 1)
    assert line.startswith("1.000 bits" if stderr is None else f"1.000 +- {stderr:.3f} bits")
    assert (f"its error {shown}" in rest) == (shown is not None)


def test_reasons_to_doubt_the_held_out_loss_are_below_it() -> None:
    output, notes = io.StringIO(), ["99 % of it is copied", "only 40 bytes"]
    summary = summary_of_ones() | {"held_out": {"notes": notes}}
    show_summary(Console(output), summary, folder=Path("run"), report=Path("r"))
    lines = [line.strip() for line in output.getvalue().splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("held-out text"))
    assert lines[first + 2 : first + 4] == notes  # after the error, which is 100 % here


def test_a_task_may_have_the_name_of_a_line_of_the_summary() -> None:
    row = {"metric": "accuracy", "value": 0.5, "stderr": None}
    summary = summary_of_ones() | {
        "baselines": [{"name": "xz", "bits_per_byte": 2.0}],
        "checkpoint": "checkpoints/step-00000001",
        "tasks": {"report": row, "cost": row},
    }
    output = io.StringIO()
    show_summary(Console(output), summary, folder=Path("run"), report=Path("run/report.html"))
    lines = output.getvalue().splitlines()
    assert "  report         accuracy 0.500" in lines
    assert "  report         run/report.html" in lines
    assert sum(line.startswith("  cost ") for line in lines) == 2


@pytest.mark.parametrize(("axes", "n_parts"), [({"tensor": 2}, 1), ({"shard": 2}, 2), ({}, 2)])
def test_the_plan_counts_processes_that_read_the_same_rows_once(
    finished_run: Path, axes: dict[str, Any], n_parts: int
) -> None:
    config = read_run_config(finished_run)
    config = replace(config, parallel=ParallelConfig(processes=2, **axes))
    data, output = prepared_text(config), io.StringIO()
    world: Any = SimpleNamespace(rank=1, size=2, device=torch.device("cpu"), threads=1)
    show_plan(Console(output), config, data, world, training_batches(config, data), [])
    (line,) = (line for line in output.getvalue().splitlines() if line.startswith("  batch "))
    numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", line)]
    batch_tokens, micro_batch, accumulation, shown_parts = numbers
    assert shown_parts == n_parts
    assert batch_tokens <= micro_batch * accumulation * n_parts < batch_tokens + micro_batch * 2
