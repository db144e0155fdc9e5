"""`verify` and `doctor`: a resume is proven, and each planted fault is found where it is."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.cli import main
from pretrain.cli.verbs import verify
from pretrain.runner.checks import read_run_config
from tiny import TINY

PLANTED = Path(__file__).parents[1] / "helpers/planted_leg.py"


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


def test_a_run_is_proven(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    ("fault", "stays"),
    [
        pytest.param("order", [], marks=pytest.mark.slow),
        pytest.param("randomness", ["order"], marks=pytest.mark.slow),
        ("optimizer", ["order"]),
        pytest.param("schedule", ["order"], marks=pytest.mark.slow),
    ],
)
def test_a_planted_fault_is_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, stays: list[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(verify, "LEG", [sys.executable, str(PLANTED), fault])
    said: list[str] = []
    checks = verify.prove(run, read_run_config(run), 4, say=said.append)["checks"]
    differing = {name for name, check in checks.items() if check["verdict"] == "differs"}
    assert {"losses", "weights"} <= differing
    assert not differing.intersection(["killed", *stays])
    assert ("order" in differing) == (fault == "order")
    assert "the legs are kept" in said[-1]


def test_a_proof_that_is_broken_off_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(verify, "_run", stopped)
    with pytest.raises(KeyboardInterrupt):
        verify.prove(run, read_run_config(run), 4, say=lambda text: None)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_proven_is_refused(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert main(["verify", str(run), "--steps", "0"]) == 2
    assert "there must be one at least in each half" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun has it
    assert main(["verify", str(run)]) == 2
    assert "give it without torchrun" in capsys.readouterr().err


def test_a_machine_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the compiler, which takes longer than all the rest, and has a test of its own."""
    from pretrain.cli.verbs import doctor

    monkeypatch.chdir(tmp_path)
    skipped = verify.Check(verify.NOT_JUDGED, "not now")
    monkeypatch.setattr(doctor, "_compiled", lambda world: skipped)
    proofs: list[Any] = []

    def proven(folder: Path, config: Any, k: int, *, say: Any) -> dict[str, str]:
        proofs.append((config.model.dropout, k))
        return {"verdict": verify.EXACT}

    monkeypatch.setattr(doctor, "prove", proven)
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    verdicts = {name: check["verdict"] for name, check in result["checks"].items()}
    agree = dict.fromkeys(("disk", "repeat", "micro-batch"), "agrees")
    assert verdicts == {**agree, "compile": "not judged"}
    assert proofs == [(0.1, 10)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones() -> None:
    from pretrain.cli.verbs import doctor
    from pretrain.distributed import open_world

    check = doctor._compiled(open_world("cpu"))
    assert check.verdict == verify.AGREES, check.found


@pytest.mark.slow
@pytest.mark.parametrize("length", [37, 64])
def test_a_compiled_model_looks_up_the_same_rows(length: int) -> None:
    """Its hash multiplies beyond 63 bits, as dropout's does, where the compiler was wrong."""
    from pretrain.model import ModelConfig, build
    from pretrain.model.config import model_defaults

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
