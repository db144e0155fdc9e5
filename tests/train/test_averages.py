"""train.ema_decay: what is averaged, what reads the average, and that a resume is exact."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.load import Checkpoint, checkpoint_name
from pretrain.cli import main
from pretrain.runner.open import load_model
from runs import Killed, assert_same_run, kill_in_step, losses, records, stop_after, train, weights
from tiny import TINY

# Lookup tables, Muon and AdamW.
SETTINGS = [*TINY, *"--train.steps 6 --train.evaluate_every 3 --model.dropout 0.1".split()]
SETTINGS += "--train.save_every 1 --train.keep_checkpoints 6".split()
DECAY = ["--train.ema_decay", "0.25"]


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The model of a checkpoint."""
    checkpoint = Checkpoint(run / "checkpoints" / checkpoint_name(step))
    return {name: checkpoint.read(f"model/{name}") for name in checkpoint.names("model")}


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("averages") / "plain"
    assert train(str(corpus), *SETTINGS, "--run", str(run)) == 0
    return run


@pytest.fixture(scope="module")
def averaged(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("averages") / "averaged"
    assert train(str(corpus), *SETTINGS, *DECAY, "--run", str(run)) == 0
    return run


def test_training_goes_on_with_the_raw_weights_and_a_checkpoint_has_both(
    plain: Path, averaged: Path
) -> None:
    assert losses(averaged) == losses(plain)
    expected = tensors_of(plain, 1)
    last = Checkpoint(averaged / "checkpoints" / checkpoint_name(6))
    for step in range(2, 7):
        decay = min(0.25, step / (9 + step))
        for name, values in tensors_of(plain, step).items():
            expected[name] = decay * expected[name] + (1 - decay) * values
    for name, values in tensors_of(averaged, 6).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-7)
        raw = last.read(f"optimizer/{name}/average")
        assert torch.equal(raw, tensors_of(plain, 6)[name]), name
        assert not torch.equal(raw, values), name


def test_evaluations_and_readers_use_the_average(plain: Path, averaged: Path) -> None:
    (first, second) = (
        [r["val_nats_per_token"] for r in records(run) if r["kind"] == "evaluate"]
        for run in (plain, averaged)
    )
    assert all(a != b for a, b in zip(first, second, strict=True))
    decoder = load_model(averaged, device="cpu").decoder
    best = tensors_of(averaged, load_model(averaged).checkpoint.step)  # type: ignore[union-attr]
    assert all(torch.equal(p, best[name]) for name, p in decoder.named_parameters())


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_killed_and_resumed_run_has_the_bits_of_one_that_was_not(
    corpus: Path, averaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_in_step(patch, step)
        with pytest.raises(Killed):
            train(str(corpus), *SETTINGS, *DECAY, "--run", str(run))
    assert train("--resume", "--run", str(run)) == 0
    assert_same_run(averaged, run)


def test_another_decay_is_named_and_none_leaves_the_raw_weights(
    corpus: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert train(str(corpus), *SETTINGS, *DECAY, "--run", str(run)) == 143
    resume = ["--resume", "--run", str(run), "--train.ema_decay", "0"]
    assert train(*resume) == 2
    assert "--accept train.ema_decay" in capsys.readouterr().err
    assert train(*resume, "--accept", "train.ema_decay") == 0
    ours, theirs = weights(run), weights(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_steps_are_added_to_the_raw_weights(averaged: Path, plain: Path, tmp_path: Path) -> None:
    runs = [shutil.copytree(run, tmp_path / run.name) for run in (averaged, plain)]
    for run in runs:
        assert main(["extend", str(run), "--train.steps", "10"]) == 0
    assert losses(runs[0]) == losses(runs[1])


def test_two_processes_average_their_shards(corpus: Path, averaged: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*SETTINGS, *DECAY, "--parallel.shard", "2", "--parallel.processes", "2"]
    assert train(str(corpus), *words, "--run", str(run)) == 0
    for a, b in itertools.zip_longest(*(tensors_of(each, 6).values() for each in (run, averaged))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
