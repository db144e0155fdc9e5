"""`verify` and `doctor`: a correct resume passes, and each planted fault is reported."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.cli import main
from pretrain.config import RunConfig
from pretrain.runner.checks import read_run_config
from pretrain.selftest import AGREES, DIFFERS, EXACT, NOT_JUDGED, Check, verify
from pretrain.train.config import TrainConfig
from tiny import TINY

FAULTY_WORKER = Path(__file__).parents[1] / "helpers/faulty_worker.py"


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "run"
    words = ["--model.family", "gpt2", "--model.dropout", "0.1", "--train.micro_batch_rows", "4"]
    words += ["--train.precision", "fp32"]
    assert (
        main(["train", str(corpus), "--run", str(folder), *TINY, *words, "--train.steps", "30"])
        == 0
    )
    return folder


def test_a_correct_resume_is_exact(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["verify", str(run), "--steps", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "exact"
    assert result["steps"] == [4, 8]
    verdicts = {name: check["verdict"] for name, check in result["checks"].items()}
    assert verdicts.pop("micro-batch") == "agrees"
    exact = "killed order losses evaluations weights optimizer"
    assert verdicts == dict.fromkeys(exact.split(), "exact")
    assert "SIGKILL after step 6, resumed from step 4" in result["checks"]["killed"]["found"]
    assert json.loads((run / "verification.json").read_text())["verdict"] == "exact"


def test_halves_of_one_step_are_verified(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run is killed after step 2 of 2, which is not saved yet."""
    assert main(["verify", str(run), "--steps", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == [1, 2]
    assert "SIGKILL after step 2, resumed from step 1" in result["checks"]["killed"]["found"]


def test_an_evaluation_that_one_run_lacks_is_a_difference(run: Path, tmp_path: Path) -> None:
    assert verify.compare(run, run, 30)["evaluations"].verdict == EXACT
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "samples.jsonl").unlink()
    assert verify.compare(run, other, 30)["evaluations"].verdict == DIFFERS
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    steps = [line for line in lines if json.loads(line)["kind"] == "train"]
    assert len(steps) < len(lines)
    (other / "metrics.jsonl").write_text("".join(steps))
    assert verify.compare(run, other, 30)["evaluations"].verdict == DIFFERS


@pytest.mark.slow
def test_micro_batches_are_compared_in_float32(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(corpus), "--run", str(tmp_path / "run"), *TINY, "--train.steps", "12"]
    assert main([*words, "--train.precision", "bf16", "--train.micro_batch_rows", "4"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run"), "--steps", "4", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert checks["micro-batch"]["verdict"] == "agrees"
    assert {check["verdict"] for name, check in checks.items() if name != "micro-batch"} == {
        "exact"
    }


@pytest.mark.parametrize(
    ("fault", "unaffected"),
    [
        pytest.param("order", [], marks=pytest.mark.slow),
        pytest.param("randomness", ["order"], marks=pytest.mark.slow),
        ("optimizer", ["order"]),
        pytest.param("schedule", ["order"], marks=pytest.mark.slow),
    ],
)
def test_a_planted_fault_is_reported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, unaffected: list[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(verify, "WORKER", [sys.executable, str(FAULTY_WORKER), fault])
    lines: list[str] = []
    checks = verify.compare_runs(run, read_run_config(run), 4, lines.append)["checks"]
    differing = {name for name, check in checks.items() if check["verdict"] == "differs"}
    assert {"losses", "weights"} <= differing
    assert not differing.intersection(["killed", *unaffected])
    assert ("order" in differing) == (fault == "order")
    assert "the runs are kept" in lines[-1]


def test_an_interrupted_verification_leaves_no_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(verify, "_train", stopped)
    with pytest.raises(KeyboardInterrupt):
        verify.compare_runs(run, read_run_config(run), 4, lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_verified_is_rejected(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert main(["verify", str(run), "--steps", "0"]) == 2
    assert "--steps must be at least 1 (got 0): the steps of each half" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        short = RunConfig(train=TrainConfig(steps=2))
        patch.setattr(verify, "read_run_config", lambda folder: short)
        assert main(["verify", str(run)]) == 2
    assert f"{run} must have at least 3 steps to be verified (it has 2)" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun has it
    assert main(["verify", str(run)]) == 2
    assert "run it without torchrun" in capsys.readouterr().err


def test_doctor_checks_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the compiler, which takes longer than all other checks and has its own test."""
    from pretrain.selftest import doctor

    monkeypatch.chdir(tmp_path)
    skipped = Check(NOT_JUDGED, "not now")
    monkeypatch.setattr(doctor, "check_compile", lambda world: skipped)
    compared: list[Any] = []

    def compare_runs(folder: Path, config: Any, k: int, log: Any) -> dict[str, str]:
        compared.append((config.model.dropout, k))
        return {"verdict": EXACT}

    monkeypatch.setattr(doctor, "compare_runs", compare_runs)
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    verdicts = {name: check["verdict"] for name, check in result["checks"].items()}
    agree = dict.fromkeys(("disk", "repeat", "micro-batch"), "agrees")
    assert verdicts == {**agree, "compile": "not judged"}
    assert compared == [(0.1, 10)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_compiled_steps_equal_eager_ones() -> None:
    from pretrain.distributed import open_world
    from pretrain.selftest import doctor

    check = doctor.check_compile(open_world("cpu"))
    assert check.verdict == AGREES, check.found


@pytest.mark.slow
@pytest.mark.parametrize("length", [37, 64])
def test_a_compiled_model_looks_up_the_same_ngram_rows(length: int) -> None:
    """Its hash multiplies beyond 63 bits, as dropout's does, where the compiler was wrong."""
    from pretrain.model.config import ModelConfig, model_defaults
    from pretrain.model.decoder import build

    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 32, "context_length": length}
    decoder = build(
        ModelConfig(**{**model_defaults({"family": "fast"}), **sizes}), vocab_size=50_000, seed=1
    )
    generator = torch.Generator().manual_seed(0)
    assert decoder.ngrams is not None
    with torch.no_grad():
        for table in decoder.ngrams.parameters():
            table.normal_(generator=generator)
    ids = torch.randint(0, 50_000, (3, length), generator=generator)
    eager = decoder(ids)
    decoder.compile(dynamic=False)
    torch.testing.assert_close(decoder(ids), eager, rtol=1e-5, atol=1e-5)
