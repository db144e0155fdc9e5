"""The loop: resume equals an uninterrupted run bit for bit, micro-batches change nothing, signals
lose nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import list_checkpoints, open_checkpoint
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import compose, parse_overrides
from pretrain.corpus import read_documents
from pretrain.data import prepare
from pretrain.distributed import open_world
from pretrain.model import LMLoss, build
from pretrain.optim import OptimizerConfig, build_optimizer
from pretrain.run.log import BestEvaluation, RunLog
from pretrain.runner.request import read_target
from pretrain.train.resolve import check_batch, resolve
from pretrain.train.signals import StopSignals
from pretrain.train.step import compute_gradients, train_step, training_steps
from runs import (
    DROPOUT,
    assert_same_run,
    batches,
    records,
    small_objective,
    stop_after,
    train,
)
from tiny import TINY


def test_a_run_writes_what_is_promised(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    promised = (
        "parameters steps tokens val_nats_per_token val_perplexity val_bits_per_byte "
        "tokens_per_second train_seconds total_seconds peak_memory_bytes checkpoint"
    )
    assert set(promised.split()) <= set(summary)
    assert summary["steps"] == 12
    assert summary["tokens"] == 12 * 256
    assert summary["val_perplexity"] == pytest.approx(math.exp(summary["val_nats_per_token"]))
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
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    words = [str(corpus), *TINY, *DROPOUT, "--train.steps", "12", "--train.evaluate_every", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*words, "--run", str(whole)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        assert train(*words, "--run", str(parts)) == 143
    assert not (parts / "summary.json").exists()
    saved = [path.name for path in list_checkpoints(parts / "checkpoints")]
    # Within the first step, which a compiler may need minutes for, there is nothing to save yet.
    assert saved[-1:] == ([] if stop_at == 1 else [f"step-{stop_at:08d}"])
    assert train("--resume", "--run", str(parts)) == 0
    assert_same_run(whole, parts)


def test_milestones_are_saved_and_kept_between_all_else(corpus: Path, tmp_path: Path) -> None:
    words = [str(corpus), *TINY, "--train.steps", "10", "--train.evaluate_every", "10"]
    words += ["--train.save_every", "5", "--train.keep_checkpoints", "2", "--train.keep_every", "3"]
    assert train(*words, "--run", str(tmp_path / "run")) == 0
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == [f"step-{step:08d}" for step in (3, 6, 9, 10)]


def test_a_save_that_failed_is_told_and_forgotten_once_the_next_is_good(
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
    words = [str(corpus), *TINY, "--train.steps", "12", "--train.save_every", "2"]
    words += ["--train.evaluate_every", "12", "--train.keep_checkpoints", "9"]
    assert train(*words, "--run", str(tmp_path / "run")) == 0
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == [f"step-{step:08d}" for step in (4, 8, 12)]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("No space left on device; training continues") == 3
    words[words.index("--train.save_every") + 1] = "1"
    failing = {5, 6, 7}
    assert train(*words, "--run", str(tmp_path / "full")) == 75
    assert "free disk space, then: --resume" in capsys.readouterr().err


def test_seconds_in_all_are_those_of_every_process(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(corpus), *TINY, "--train.steps", "6", "--run", str(tmp_path)]
    real = save_checkpoint

    def save(folder: Path, *, state: dict[str, Any], **rest: Any) -> Path:
        """As if it had worked for so much longer."""
        later = {name: state[name] + 1000 for name in ("train_seconds", "total_seconds")}
        return real(folder, state={**state, **later}, **rest)

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.checkpoint.save.save_checkpoint", save)
        stop_after(patch, 3)
        assert train(*words) == 143
    assert train("--resume", "--run", str(tmp_path)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 1000 < summary["train_seconds"] < summary["total_seconds"] < 1200


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_cuts_its_records_back(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(corpus), *TINY, "--train.steps", "10", "--train.evaluate_every", "4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(*words, "--run", str(whole)) == 0

    class Killed(BaseException):
        pass

    real = compute_gradients
    made = 0

    def dying(*args: Any, **keywords: Any) -> Any:
        nonlocal made
        made += 1
        if made == 8:
            raise Killed
        return real(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.train.loop.compute_gradients", dying)
        with pytest.raises(Killed):
            train(*words, "--run", str(killed))
    assert records(killed)[-1]["step"] == 7
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 8, "lo')  # what a crash in a write leaves
    assert train("--resume", "--run", str(killed)) == 0
    assert_same_run(whole, killed)
    cut = (killed / "metrics.jsonl.cut-1").read_text()
    assert '"step": 7' in cut


def test_a_damaged_checkpoint_costs_its_steps_and_no_more(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = [str(corpus), *TINY, "--train.steps", "10", "--train.evaluate_every", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*words, "--run", str(whole)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert train(*words, "--run", str(parts)) == 143
    file = parts / "checkpoints" / "step-00000007" / "optimizer-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    capsys.readouterr()
    assert train("--resume", "--run", str(parts)) == 0
    said = capsys.readouterr().out
    assert "optimizer-00000.safetensors" in said
    assert "resuming" in said
    assert "after step 4" in said
    assert_same_run(whole, parts)


def test_resume_refuses_other_settings_other_text_and_other_threads(
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
    said = capsys.readouterr().err
    assert "train.steps: 9 -> 11" in said
    assert "optimizer.clip: 1.0 -> 2.0" in said
    text.write_bytes(corpus.read_bytes().replace(b"the", b"then"))
    assert train(*resume) == 2
    assert "training text:" in capsys.readouterr().err
    text.write_bytes(corpus.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.run.identity.code_hash", lambda: "another")
        assert train(*resume) == 2
        assert "code: " in capsys.readouterr().err
    # The run's own command with --resume behind it is no change.
    assert train(str(text), *TINY, "--train.steps", "9", *resume) == 0
    assert train(*resume) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_run_that_died_between_summary_and_report_gets_its_report(
    finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "report.html").unlink()
    assert train("--resume", "--run", str(run)) == 0
    report = (run / "report.html").read_bytes()
    # So does one that had been stopped before, and has the report of that.
    (run / "report.html").write_text("of an earlier stop")
    os.utime(run / "report.html", (0, 0))
    assert train("--resume", "--run", str(run)) == 0
    assert (run / "report.html").read_bytes() == report


@pytest.mark.parametrize("least", [1, 50])
def test_minutes_buy_one_reading_of_a_text_where_there_are_ngram_tables(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    least: int,
) -> None:
    monkeypatch.setattr("pretrain.train.resolve.SHORT_RUN", least)
    words = [str(corpus), *TINY, "--train.minutes", "9", "--train.evaluate_every", "1000000"]
    words += ["--run", str(tmp_path / "run"), "--model.ngram_rows", "64"]
    assert train(*words, "--train.batch_tokens", "2048") == 0
    done = json.loads((tmp_path / "run" / "summary.json").read_text())
    once = math.ceil(done["tokens"] / done["epochs"] / 2048)
    assert 1 < once < 50
    assert done["steps"] == max(least, once)
    assert "n-gram tables overfit after the first epoch" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("family", "size", "vocab_size", "decided"),
    [
        # A context that grows with fast, and micro-batches whose layers fit the caches.
        ("fast", 2, 400, {"context_length": 256, "longest_ngram": 6, "tokens": 3840}),
        ("fast", 5, 1100, {"context_length": 512, "longest_ngram": 3, "tokens": 2048}),
        ("gpt2", None, 1100, {"context_length": 128, "longest_ngram": None, "tokens": 6144}),
    ],
)
def test_what_is_left_empty_follows_from_sizes(
    tmp_path: Path, family: str, size: int | None, vocab_size: int, decided: dict[str, int | None]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(document.text for document in read_documents("bundled"))[:120_000])
    data = prepare(text, tmp_path / "prepared", vocab_size=vocab_size)
    config = compose([{"model": {"family": family, "size": size}, "train": {"steps": 3}}])
    whole = replace(config.train, batch_tokens=30_720)
    found = resolve(replace(config, train=whole), data, open_world("cpu", threads=1))
    assert found.model.context_length == decided["context_length"]
    assert found.model.longest_ngram == decided["longest_ngram"]
    assert found.train.micro_batch_rows is not None
    tokens = found.train.micro_batch_rows * found.model.window_tokens
    assert tokens == decided["tokens"]


@pytest.mark.parametrize("recipe", ["english", "characters", "multitask"])
@pytest.mark.parametrize("size", range(1, 13))
def test_a_recipes_batch_is_whole_windows_however_its_dial_is_turned(
    recipe: str, size: int
) -> None:
    config = compose([*read_target(recipe)[1], parse_overrides(["--model.size", str(size)])])
    context, batch_tokens = check_batch(config.model, config.train, n_tokens=1_000_000)
    assert batch_tokens == config.train.batch_tokens
    assert batch_tokens % context == 0
    assert context == 384 if recipe == "multitask" else size * 64 < context <= size * 128
    assert config.model.ngram_rows == (131_072 if recipe == "english" else 65_536)


def test_a_run_without_a_checkpoint_is_not_begun_anew_on_another_text(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text, run = tmp_path / "text.jsonl", tmp_path / "run"
    text.write_bytes(corpus.read_bytes())

    def dying(*args: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.train.loop.compute_gradients", dying)
        assert train(str(text), *TINY, "--train.steps", "2", "--run", str(run)) == 130
    text.write_bytes(corpus.read_bytes().replace(b"the", b"then"))
    assert train("--resume", "--run", str(run)) == 2
    assert "training text:" in capsys.readouterr().err
    text.write_bytes(corpus.read_bytes())
    assert train("--resume", "--run", str(run)) == 0
    assert "it starts anew" in capsys.readouterr().out


def test_ctrl_c_in_a_real_process_saves_and_says_how_to_go_on(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-m", "pretrain", "train", str(corpus), "--run", str(run), *TINY]
    child = subprocess.Popen(
        [*words, "--train.steps", "100000", "--train.evaluate_every", "100000"],
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 2000):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert f"pretrain train --resume --run {run}" in said
    saved = list_checkpoints(run / "checkpoints")[-1]
    assert open_checkpoint(saved).step == records(run)[-1]["step"]


@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"), [(torch.float32, 20, 1e-5), (torch.float64, 50, 1e-9)]
)
def test_the_micro_batch_changes_no_number(
    dtype: torch.dtype, steps: int, tolerance: float
) -> None:
    """DESIGN section 6: 20 steps in float32 within 1e-5 relative, 50 in float64 within 1e-9; with
    dropout."""
    curves = []
    for micro in (6, 2, 1):
        lm_loss = small_objective(dropout=0.1).to(dtype)
        optimizer = build_optimizer(lm_loss.named_parameters(), config=OptimizerConfig())
        reports = training_steps(
            lm_loss,
            optimizer,
            lambda step, micro=micro: batches(6, micro, seed=step % 3),  # type: ignore[misc]
            lr_at=lambda step: 1e-2,
            steps=steps,
            clip=1.0,
            world=open_world("cpu", threads=1),
        )
        curves.append([r.nats_per_token for r in reports])
    assert curves[1] == pytest.approx(curves[0], rel=tolerance)
    assert curves[2] == pytest.approx(curves[0], rel=tolerance)
    assert curves[0][-1] < curves[0][0] - 0.5


def test_the_gradient_is_that_of_nats_per_target() -> None:
    """Divided once by all targets of the step; AdamW would hide another scale, not the norm."""
    lm_loss = small_objective()
    optimizer = build_optimizer(lm_loss.named_parameters(), config=OptimizerConfig())
    nats, count = lm_loss(batches(6, 6)[0])
    gradients = torch.autograd.grad(nats / count, list(lm_loss.parameters()))
    expected = float(torch.nn.utils.get_total_norm(gradients))
    world = open_world("cpu", threads=1)
    found = train_step(lm_loss, optimizer, batches(6, 2), step=0, lr=1e-3, clip=0.0, world=world)
    assert found.count == 6 * 8
    assert found.nats == pytest.approx(float(nats.detach()), rel=1e-6)
    assert found.grad_norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "fast"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_batch_can_be_learnt_by_heart(family: str, name: str) -> None:
    chosen = compose(
        [{"model": {"family": family, "d_model": 32, "context_length": 8, "n_layers": 2}}]
    )
    lm_loss = LMLoss(build(chosen.model, vocab_size=50, seed=1))
    optimizer = build_optimizer(
        lm_loss.named_parameters(),
        config=OptimizerConfig(name=name, weight_decay=0.0),  # type: ignore[arg-type]
    )
    reports = training_steps(
        lm_loss,
        optimizer,
        lambda step: batches(4, 4),
        lr_at=lambda step: 1e-2,
        steps=120,
        world=open_world("cpu", threads=1),
    )
    losses = [r.nats_per_token for r in reports]
    assert losses[0] == pytest.approx(math.log(50), abs=0.2)
    assert losses[-1] < 0.1


def test_a_gradient_that_is_not_finite_makes_no_update() -> None:
    lm_loss = small_objective()
    optimizer = build_optimizer(lm_loss.named_parameters(), config=OptimizerConfig())
    with torch.no_grad():
        lm_loss.decoder.get_parameter("final_norm.weight")[0] = math.inf
    before = [p.clone() for p in lm_loss.parameters()]
    report = train_step(
        lm_loss,
        optimizer,
        batches(4, 2),
        step=0,
        lr=1e-3,
        clip=1.0,
        world=open_world("cpu", threads=1),
    )
    assert not math.isfinite(report.grad_norm)
    assert not report.updated
    assert all(torch.equal(a, b) for a, b in zip(before, lm_loss.parameters(), strict=True))


def test_a_run_that_diverges_says_so(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    wild = [
        "--optimizer.learning_rate",
        "1e30",
        "--optimizer.name",
        "adamw",
        "--optimizer.clip",
        "0",
    ]
    words = [str(corpus), *TINY, *wild, "--train.steps", "30", "--run", str(tmp_path / "run")]
    assert train(*words) == 2
    assert "a lower optimizer.learning_rate" in capsys.readouterr().err


def test_patience_stops_a_run_that_no_longer_improves(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [str(corpus), *TINY, "--run", str(run), "--train.steps", "60"]
    # A rate far too high to improve for long.
    stops = ["--train.patience", "2", "--train.evaluate_every", "2"]
    assert train(*words, *stops, "--optimizer.learning_rate", "0.5") == 0
    summary = json.loads((run / "summary.json").read_text())
    evaluations = [r for r in records(run) if r["kind"] == "evaluate"]
    assert summary["steps"] < 60
    best = min(evaluations, key=lambda r: r["val_nats_per_token"])
    assert evaluations[-1]["step"] == best["step"] + 4
    assert summary["checkpoint"] == f"checkpoints/step-{best['step']:08d}"
    # So it does where it died before it could say so.
    before = records(run)
    (run / "summary.json").unlink()
    assert train("--resume", "--run", str(run)) == 0
    assert records(run) == before
    assert json.loads((run / "summary.json").read_text())["steps"] == summary["steps"]


def test_best_is_a_function_of_the_records() -> None:
    best = BestEvaluation.from_log(
        [
            {"kind": "evaluate", "step": s, "val_nats_per_token": v}
            for s, v in ((1, 3), (2, 2), (3, 4))
        ]
    )
    assert (best.step, best.since) == (2, 1)


def test_records_survive_line_separators_in_samples(tmp_path: Path) -> None:
    kept = RunLog(tmp_path)
    text = "a\u2028b\u0085c\x0cd\n"
    for step in (1, 2, 3):
        kept.append_sample({"step": step, "text": text})
        kept.append_metrics({"kind": "train", "step": step, "loss": math.nan})
    kept.truncate(2)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [{"step": s, "text": text} for s in (1, 2)]
    assert kept.metrics()[0]["loss"] is None


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files are found by descriptor")
def test_records_are_on_the_disk_by_line_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, synced, real = RunLog(tmp_path), set(), os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    kept.append_metrics({"step": 1})
    kept.append_sample({"step": 1})
    kept.sync()
    assert synced == {tmp_path, tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"}


def test_a_second_signal_stops_at_once() -> None:
    # A shell that starts the tests in the background has SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        assert stop.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
