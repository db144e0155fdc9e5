"""What docs/explanation/exactness.md promises of numbers and of signals, level by level."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pretrain.checkpoint import list_checkpoints
from pretrain.cli import main
from pretrain.config import compose, read_file
from pretrain.data import MicroBatch
from pretrain.data.batches import IGNORE_INDEX
from pretrain.distributed import World, open_world
from pretrain.model import LMLoss, ModelConfig, build
from pretrain.model.config import model_defaults
from pretrain.optim import OptimizerConfig, build_optimizer
from pretrain.train import StepReport, TrainConfig
from pretrain.train.resolve import resolve_precision
from pretrain.train.step import train_step
from runs import (
    DROPOUT,
    assert_same_run,
    batches,
    records,
    small_objective,
    stop_after,
    train,
    weights,
)
from tiny import TINY


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if record["kind"] == "train"]


@pytest.mark.parametrize("rows", [1, 3, 5, 8])
def test_r0_the_order_does_not_hang_on_the_micro_batch(
    corpus: Path, tmp_path: Path, rows: int
) -> None:
    """3 and 5 do not divide the 8 windows of a batch: missing rows weigh nothing."""
    words = ["train", str(corpus), *TINY, *DROPOUT, "--train.steps", "6"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run, micro in ((whole, 8), (parts, rows)):
        assert main([*words, "--train.micro_batch_rows", str(micro), "--run", str(run)]) == 0
    ids = [[r["ids"] for r in records(run) if r["kind"] == "train"] for run in (whole, parts)]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 6
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_r1_two_runs_of_one_config_have_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    one, other, third = tmp_path / "one", tmp_path / "other", tmp_path / "third"
    words = ["train", str(corpus), *TINY, *DROPOUT, "--train.steps", "6"]
    assert main([*words, "--run", str(one)]) == 0
    torch.manual_seed(12345)  # nothing of ours hangs on torch's own generator
    torch.rand(7)
    assert main(["train", str(one / "config.yaml"), "--run", str(other)]) == 0
    assert_same_run(one, other)
    assert main([*words, "--train.seed", "2", "--run", str(third)]) == 0
    assert losses(third) != losses(one)


def masked(parts: list[tuple[int, int]]) -> list[MicroBatch]:
    """Micro-batches of 12 rows in all, the first 5 targets of every third row not counted."""
    (whole,) = batches(12, 12)
    targets = whole.targets.clone()
    targets[::3, :5] = IGNORE_INDEX
    masked_batch = whole._replace(targets=targets)
    return [MicroBatch(*(part[a:b] for part in masked_batch)) for a, b in parts]


def made(lm_loss: LMLoss, micro_batches: list[MicroBatch]) -> StepReport:
    optimizer = build_optimizer(lm_loss.named_parameters(), config=OptimizerConfig())
    world = open_world("cpu", threads=1)
    return train_step(lm_loss, optimizer, micro_batches, step=0, lr=1e-2, clip=0.0, world=world)


def test_masks_and_unequal_rows_are_divided_once_by_what_was_counted() -> None:
    found = []
    for parts in ([(0, 12)], [(0, 1), (1, 8), (8, 12)]):
        lm_loss = small_objective().double()
        report = made(lm_loss, masked(parts))
        found.append((report, [p.detach().clone() for p in lm_loss.parameters()]))
    (one, ours), (other, theirs) = found
    # torch's own mean over what is counted has the same gradient.
    (batch,), lm_loss = masked([(0, 12)]), small_objective().double()
    logits = lm_loss.decoder.logits(lm_loss.decoder(batch.inputs))
    F.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX
    ).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in lm_loss.parameters() if p.grad is not None]
    assert one.grad_norm == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-9)
    assert one.count == other.count == 12 * 8 - 4 * 5
    assert other.nats_per_token == pytest.approx(one.nats_per_token, rel=1e-12)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-9)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_batch_without_targets_changes_nothing() -> None:
    lm_loss = small_objective()
    before = [p.detach().clone() for p in lm_loss.parameters()]
    (batch,) = batches(4, 4)
    empty = batch._replace(targets=torch.full_like(batch.targets, IGNORE_INDEX))
    report = made(lm_loss, [empty])
    assert (report.nats, report.count, report.updated) == (0.0, 0, False)
    assert report.nats_per_token == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, lm_loss.parameters(), strict=True))


@pytest.mark.parametrize(
    ("number", "evaluation_of"),
    [(signal.SIGTERM, 8), (signal.SIGINT, 12), (signal.SIGUSR1, 8)],
)
def test_a_signal_in_an_evaluation_loses_no_step_and_no_evaluation(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    evaluation_of: int,
) -> None:
    """It is broken off, the step is saved, and the resume begins with that evaluation, also with
    the last one."""
    words = [str(corpus), *TINY, *DROPOUT, "--train.steps", "12", "--train.evaluate_every", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*words, "--run", str(whole)) == 0

    from pretrain.train import eval_hooks as evaluation

    real, calls = evaluation.score_batches, 0  # type: ignore[attr-defined]

    def disturbed(lm_loss: Any, micro_batches: Any, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != evaluation_of // 4:
            return real(lm_loss, micro_batches, **rest)
        os.kill(os.getpid(), number)
        left = list(micro_batches)
        assert left == []  # an evaluation may take longer than the time that is given
        return real(lm_loss, left, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "score_batches", disturbed)
        assert train(*words, "--run", str(parts)) == 128 + number
    done = [r["step"] for r in records(parts) if r["kind"] == "evaluate"]
    assert done == list(range(4, evaluation_of, 4))
    assert list_checkpoints(parts / "checkpoints")[-1].name == f"step-{evaluation_of:08d}"
    assert not (parts / "summary.json").exists()
    assert train("--resume", "--run", str(parts)) == 0
    assert_same_run(whole, parts)


def test_a_signal_after_the_last_step_stops_at_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(corpus), *TINY, "--train.steps", "6"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*words, "--run", str(whole)) == 0

    from pretrain.train import loop

    def counting(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it was to stop")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "measure_baselines", counting)
        assert train(*words, "--run", str(parts)) == 143
    assert not (parts / "summary.json").exists()
    assert train("--resume", "--run", str(parts)) == 0
    assert_same_run(whole, parts)


@pytest.mark.parametrize("stage", ["preparing", "deciding"])
def test_a_run_that_died_before_it_was_decided_is_resumed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Killed, not stopped: an exception would take the folder back, as it does for wrong words."""
    words = [str(corpus), *TINY, "--train.steps", "4", "--run", str(tmp_path / "run")]
    before = os.fork()
    if before == 0:
        from pretrain.runner import start

        name = {"preparing": "open_text", "deciding": "_resolve"}[stage]
        setattr(start, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        main(["train", *words])
        os._exit(9)
    assert os.WTERMSIG(os.waitpid(before, 0)[1]) == signal.SIGKILL
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"requested.yaml", "run.lock"}
    assert train("--resume", "--run", str(tmp_path / "run")) == 0
    config = compose([read_file(tmp_path / "run" / "config.yaml")])
    assert config.train.steps == 4
    assert not (tmp_path / "run" / "requested.yaml").exists()
    assert train(*words) == 2  # it is a run now


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 steps that was stopped after 7."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    words = [*TINY, "--train.steps", "9", "--train.evaluate_every", "3"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 7)
        assert train(str(corpus), *words, "--run", str(run)) == 143
    return run


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("metrics.jsonl", "--accept metrics"),
        ("samples.jsonl", "--accept samples"),
        ("environment.json", "environment.json is damaged"),
        ("config.yaml", "config.yaml"),
        ("tokenizer/tokenizer.json", None),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "emptied", "random bytes"])
def test_a_damaged_file_of_a_run_is_said_and_never_used(
    stopped: Path, tmp_path: Path, capsys: Any, name: str, says: str | None, damage: str
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    content = (run / name).read_bytes()
    bad = {"cut": content[: len(content) // 2], "emptied": b"", "random bytes": bytes(range(256))}
    (run / name).write_bytes(bad[damage])
    capsys.readouterr()
    code = train("--resume", "--run", str(run))
    said = capsys.readouterr()
    if says is not None:
        assert code == 2
        # An empty config is one: all its settings differ from the checkpoint's.
        assert says in said.err or (name == "config.yaml" and "have changed" in said.err)
    else:  # the text has another copy
        assert code == 0
        assert "is written anew" in said.out
        assert (run / name).read_bytes() == content


def test_a_model_is_not_read_with_another_tokenizer(
    finished_run: Path, tmp_path: Path, capsys: Any
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    file = run / "tokenizer" / "tokenizer.json"
    words = json.loads(file.read_text())
    merges = words["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    file.write_text(json.dumps(words))
    assert main(["next", str(run), "--prompt", "The"]) == 2
    assert "is not the tokenizer that step-00000012 was trained with" in capsys.readouterr().err


def test_accepted_records_are_accepted_once(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    (run / "metrics.jsonl").write_text("".join(lines[2:]))
    assert train("--resume", "--run", str(run)) == 2
    assert train("--resume", "--run", str(run), "--accept", "metrics") == 0
    assert [r["step"] for r in records(run) if r["kind"] == "train"][-1] == 9


@pytest.mark.slow
def test_a_resume_without_the_compilers_cache_has_the_same_bits(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    cache = tmp_path / "compiled"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    words = [str(corpus), *TINY, *DROPOUT, "--train.steps", "8", "--train.evaluate_every", "4"]
    words += ["--train.compile", "on"]

    def run(*more: str) -> int:
        command = [sys.executable, "-m", "pretrain", *more]
        return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL).returncode

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("train", *words, "--run", str(whole)) == 0
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


@pytest.mark.parametrize(
    ("asked", "units", "chosen"),
    [
        ({"minutes": 1.0}, True, "bf16"),
        ({"minutes": 1.0}, False, "fp32"),
        # What is to be the same on every machine is the same.
        ({"minutes": 1.0, "steps": 3}, True, "fp32"),
        ({"minutes": 1.0, "precision": "fp32"}, True, "fp32"),
    ],
)
def test_a_cpu_multiplies_in_bf16_only_to_make_more_steps_in_the_same_minutes(
    asked: dict[str, Any], units: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "has_native_bf16", lambda world: units)
    world = open_world("cpu", threads=1)
    assert resolve_precision(TrainConfig(**asked), world) == chosen


def test_a_step_in_bf16_is_near_one_in_float32() -> None:
    """Rounded to 8 bits: the loss, and how gradients lie."""
    world, losses, gradients = open_world("cpu", threads=1), [], []
    config = ModelConfig(**{**model_defaults({"family": "fast", "size": 1}), "context_length": 32})
    ids = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(3))
    targets = ids[:, 1:].clone()
    targets[1, 7:] = IGNORE_INDEX
    batch = MicroBatch(ids[:, :-1], targets, torch.arange(4))
    for precision in ("fp32", "bf16"):
        lm_loss = LMLoss(build(config, vocab_size=300, seed=1))
        with world.autocast(precision):
            nats, _ = lm_loss(batch)
        nats.backward()
        losses.append(float(nats.detach()))
        gradients.append({n: p.grad for n, p in lm_loss.named_parameters() if p.grad is not None})
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert gradients[0].keys() == gradients[1].keys()
    for name, exact in gradients[0].items():
        near = gradients[1][name]
        assert near.dtype == torch.float32
        exact, near = exact.to_dense().flatten(), near.to_dense().flatten()
        if exact.any():
            assert float((near - exact).norm() / exact.norm()) < 0.03, name
