"""Losses that jump or are not finite: detected before the update, described in a file, skipped."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.checkpoint.format import DamagedCheckpoint
from pretrain.checkpoint.load import Checkpoint, checkpoint_name, list_checkpoints
from pretrain.checkpoint.save import save_checkpoint
from pretrain.cli import main
from pretrain.data.batches import MicroBatch, micro_batch_at
from pretrain.data.order import Rollback, batch_of_step
from pretrain.distributed import open_world
from pretrain.run.log import METRICS_KEYS
from pretrain.train import build as build_module
from pretrain.train import state
from pretrain.train.monitor import (
    LEAST_STEPS,
    MOST_IN_A_ROW,
    NOT_FINITE,
    SPIKE,
    SpikeDetector,
)
from runs import Killed, assert_same_run, kill_in_step, records, stop_after
from tiny import TINY

SETTINGS = [*TINY, *"--train.steps 60 --train.evaluate_every 10 --train.spike_threshold 5".split()]
SETTINGS += ["--train.ema_decay", "0.9"]  # skipped and restored with the weights


POISONED_BATCH = 45


def check_all(
    losses: list[float], threshold: float = 6.0
) -> tuple[SpikeDetector, list[str | None]]:
    """The detector after these losses, and the kind of each one's anomaly."""
    detector, kinds = SpikeDetector(threshold), []
    for loss in losses:
        anomaly = detector.check(loss, 1.0)
        detector.record(loss, anomaly)
        kinds.append(None if anomaly is None else anomaly.kind)
    return detector, kinds


def test_spike_is_detected_and_noise_is_not() -> None:
    noise = [3.0 + 0.01 * math.sin(7 * i) for i in range(200)]
    assert set(check_all(noise)[1]) == {None}
    assert check_all([*noise, 3.5, 3.0])[1][-2:] == [SPIKE, None]
    assert check_all([*noise[: LEAST_STEPS - 1], 9.0])[1][-1] is None  # too early to tell
    assert check_all([*noise, 2.0])[1][-1] is None  # a better loss is not an anomaly
    assert check_all([*noise, math.nan, 3.0])[1][-2:] == [NOT_FINITE, None]


def test_gradient_that_is_not_finite_is_detected() -> None:
    anomaly = SpikeDetector(6.0).check(3.0, math.inf)
    assert anomaly is not None
    assert anomaly.kind == NOT_FINITE


def test_new_level_is_accepted_after_ten_steps() -> None:
    steady = [3.0 + 0.01 * (i % 3) for i in range(100)]
    _, kinds = check_all(steady + [5.0] * (MOST_IN_A_ROW + 50))
    assert kinds[100:] == [SPIKE] * MOST_IN_A_ROW + [None] * 50


def test_detector_is_a_function_of_the_log() -> None:
    losses = [3.0 + 0.01 * (i % 5) for i in range(60)] + [9.0, 3.0, math.nan, 3.01]
    detector, kinds = check_all(losses)
    lines = [
        {"kind": "train", "loss": None if math.isnan(x) else x, "finding": f}
        for x, f in zip(losses, kinds, strict=True)
    ]
    assert SpikeDetector.from_log(lines, threshold=6.0) == detector


def test_rolled_back_batches_are_skipped() -> None:
    backs = [Rollback(40, 6), Rollback(40, 3), Rollback(50, 1)]
    assert [batch_of_step(s, backs) for s in (39, 40, 49, 50)] == [39, 49, 58, 60]


def poison(
    monkeypatch: pytest.MonkeyPatch, *, with_nan: bool = False, all_later: bool = False
) -> None:
    """Spoil the targets of one batch of the data, or of `all_later` ones too."""

    def spoilt(*args: Any, sample: int, **rest: Any) -> MicroBatch:
        batch = micro_batch_at(*args, sample=sample, **rest)
        batch_number = sample // 8  # 8 windows a batch
        if batch_number < POISONED_BATCH or (batch_number > POISONED_BATCH and not all_later):
            return batch
        noise = torch.full_like(batch.targets, 399)  # the last token of the vocabulary
        return batch._replace(targets=noise)

    monkeypatch.setattr(build_module, "micro_batch_at", spoilt)
    if with_nan:
        from pretrain.model import loss

        plain = loss.chunked_cross_entropy

        def broken(hidden: Any, weight: Any, targets: Any, **rest: Any) -> Any:
            factor = math.nan if bool((targets == 399).all()) else 1.0
            return plain(hidden, weight, targets, **rest) * factor

        monkeypatch.setattr(loss, "chunked_cross_entropy", broken)


def trained(corpus: Path, run: Path, action: str) -> list[dict[str, Any]]:
    args = ["train", str(corpus), *SETTINGS, "--train.spike_action", action, "--run", str(run)]
    assert main(args) == 0
    lines = records(run)
    for line in lines:
        assert line.keys() <= METRICS_KEYS[line["kind"]].keys() | {"kind"}
    return lines


def anomalies_in(lines: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(line["step"], line["finding"]) for line in lines if "finding" in line]


def weights_after(run: Path, step: int) -> dict[str, torch.Tensor]:

    checkpoint = Checkpoint(run / "checkpoints" / checkpoint_name(step))
    return {n: checkpoint.read(f"model/{n}") for n in checkpoint.names("model")}


def test_warn_describes_the_spike_and_makes_the_update(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    poison(monkeypatch)
    lines = trained(corpus, tmp_path / "run", "warn")
    assert anomalies_in(lines) == [(POISONED_BATCH + 1, SPIKE)]
    assert (
        "standard deviations above the steps before; the update is made" in capsys.readouterr().out
    )
    found = json.loads((tmp_path / "run" / "post-mortem" / "step-00000046.json").read_text())
    assert found["z_score"] > 5
    assert len(found["last_steps"]) == POISONED_BATCH
    assert found["documents"]
    assert all({"id", "file", "sample", "first_token"} <= row.keys() for row in found["documents"])
    norms = found["gradient_norms"]
    assert math.sqrt(sum(n * n for n in norms.values())) == pytest.approx(
        found["grad_norm"], rel=1e-4
    )
    assert any("attention.query" in name for name in norms)
    sample = found["documents"][0]["sample"]
    capsys.readouterr()
    assert main(["trace", str(tmp_path / "run"), "--step", str(POISONED_BATCH + 1), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)["seen"]
    assert seen[0]["sample"] == sample
    assert [row["id"] for row in seen] == [row["id"] for row in found["documents"]]


@pytest.mark.parametrize(("with_nan", "kind"), [(False, SPIKE), (True, NOT_FINITE)])
def test_skipped_step_changes_no_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_nan: bool, kind: str
) -> None:
    """The poisoned step is the last before a checkpoint, and the one before it is saved too."""
    poison(monkeypatch, with_nan=with_nan)
    action = "warn" if with_nan else "skip"  # a loss that is not finite is always skipped
    args = ["--train.save_every", str(POISONED_BATCH)]
    run = tmp_path / "run"
    stop_after(monkeypatch, POISONED_BATCH + 1)
    whole = ["train", str(corpus), *SETTINGS, "--train.spike_action", action, "--run", str(run)]
    assert main([*whole, *args]) == 143
    assert anomalies_in(records(run)) == [(POISONED_BATCH + 1, kind)]
    before, after = weights_after(run, POISONED_BATCH), weights_after(run, POISONED_BATCH + 1)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(["train", "--resume", "--run", str(run)]) == 0
    assert [x for x in records(run) if x["kind"] == "train"][-1]["loss"] < 6.5


def test_rollback_skips_data_and_survives_a_stop(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plain = trained(corpus, tmp_path / "plain", "off")
    poison(monkeypatch)
    whole = tmp_path / "whole"
    lines = trained(corpus, whole, "rollback")
    assert [line for line in lines if line["kind"] == "rollback"] == [
        {"kind": "rollback", "step": 40, "batches": 6}
    ]
    read = {line["step"]: line["ids"] for line in lines if line["kind"] == "train"}
    had = {line["step"]: line["ids"] for line in plain if line["kind"] == "train"}
    assert [read[s] for s in range(1, 41)] == [had[s] for s in range(1, 41)]
    assert [read[s] for s in range(41, 55)] == [had[s + 6] for s in range(41, 55)]
    assert anomalies_in(lines) == []
    # A stop after the rollback, before and after a checkpoint that was saved since.
    for steps in (POISONED_BATCH + 4, POISONED_BATCH + 14):
        parts = tmp_path / f"parts-{steps}"
        args = ["train", str(corpus), *SETTINGS, "--train.spike_action", "rollback"]
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            assert main([*args, "--run", str(parts)]) == 143
        assert main(["train", "--resume", "--run", str(parts)]) == 0
        assert_same_run(whole, parts)
    capsys.readouterr()
    assert main(["trace", str(whole), "--step", "41", "--json"]) == 0
    moved = json.loads(capsys.readouterr().out)["seen"]
    assert main(["trace", str(tmp_path / "plain"), "--step", "47", "--json"]) == 0
    there = json.loads(capsys.readouterr().out)["seen"]
    assert [r["sample"] for r in moved] == [r["sample"] for r in there]
    assert {r["step"] for r in moved} == {41}


def contents(run: Path) -> dict[str, bytes]:
    """The files of a run by name, without run.lock."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def test_log_without_its_rollback_is_rejected_and_nothing_is_changed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    poison(monkeypatch)
    run = tmp_path / "run"
    args = ["train", str(corpus), *SETTINGS, "--train.spike_action", "rollback", "--run", str(run)]
    with monkeypatch.context() as patch:
        stop_after(patch, POISONED_BATCH + 12)
        assert main(args) == 143
    metrics = run / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(True) if '"rollback"' not in line]
    metrics.write_text("".join(kept))
    assert main(["train", "--resume", "--run", str(run)]) == 2
    assert "(--accept metrics)" in capsys.readouterr().err
    # Lines of a later step, which a resume removes once its checks have passed.
    for name, later in (
        ("metrics.jsonl", '{"kind": "train", "step": 99}'),
        ("samples.jsonl", '{"step": 99}'),
    ):
        with open(run / name, "a") as file:
            file.write(later + "\n")
    before = contents(run)
    assert main(["train", "--resume", "--run", str(run), "--accept", "metrics"]) == 2
    assert contents(run) == before
    assert capsys.readouterr().err == (
        f"pretrain: {metrics} does not belong to the checkpoint of step 51: the next batch is "
        "number 57 by the checkpoint, and 51 by the rollbacks in the log. Restore the original "
        "metrics.jsonl, or delete that checkpoint to resume from an older one\n"
    )


def test_repeated_rollbacks_end_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    poison(monkeypatch, all_later=True)
    args = ["train", str(corpus), *SETTINGS, "--train.spike_action", "rollback"]
    assert main([*args, "--run", str(tmp_path / "run")]) == 2
    assert "again and again after step 40; 3 rollbacks did not help" in capsys.readouterr().err


def test_checkpoint_of_another_run_is_rejected(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:

    for seed in ("1", "2"):
        with monkeypatch.context() as patch:
            stop_after(patch, 5)
            args = [*TINY, "--train.steps", "12", "--train.seed", seed]
            run = tmp_path / seed
            assert main(["train", str(corpus), *args, "--run", str(run)]) == 143
    mine, other = (tmp_path / seed / "checkpoints" / "step-00000005" for seed in ("1", "2"))
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    assert main(["train", "--resume", "--run", str(tmp_path / "1")]) == 2
    assert "is a checkpoint of another run" in capsys.readouterr().err


def test_rolled_back_checkpoints_are_deleted_before_the_log_is_truncated(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best evaluations, 42 and 45, were saved between 40, which was due, and the spike."""
    poison(monkeypatch)
    args = ["train", str(corpus), *SETTINGS, "--train.spike_action", "rollback"]
    args += ["--train.save_every", "20", "--train.evaluate_every", "3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*args, "--run", str(whole)]) == 0

    with monkeypatch.context() as patch:
        # The second step after the rollback, before anything is saved.
        kill_in_step(patch, POISONED_BATCH + 2)
        with pytest.raises(Killed):
            main([*args, "--run", str(killed)])
    assert list_checkpoints(killed / "checkpoints")[-1].name == "step-00000040"
    assert main(["train", "--resume", "--run", str(killed)]) == 0
    assert_same_run(whole, killed)


def test_rollback_target_is_the_due_or_newest_checkpoint(tmp_path: Path) -> None:
    """The newest one if the due one could not be saved; without one, nothing is deleted."""

    config = SimpleNamespace(train=SimpleNamespace(save_every=20))
    run: Any = SimpleNamespace(
        config=config, step=45, world=open_world("cpu"), checkpoints=tmp_path, folder=tmp_path
    )
    message = (
        f"^{tmp_path} has no checkpoint to roll back to: that of step 40 could not be saved; free "
        "disk space, then start the run again$"
    )
    with pytest.raises(ValueError, match=message):
        state.rollback_target(run)
    for step, target in ((30, 30), (43, 43), (40, 40)):
        save_checkpoint(tmp_path, step=step, tensors={"model/w": torch.ones(2)}, state={})
        assert state.rollback_target(run) == target
    (file,) = (tmp_path / "step-00000040").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedCheckpoint):
        state.rollback_target(run)
    assert len(list_checkpoints(tmp_path)) == 3
    run.step = 19
    assert state.rollback_target(run) == 0
