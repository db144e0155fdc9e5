"""`load_model`, the front door of the library: it generates, predicts and scores as the commands
do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.runner.open import LoadedModel, load_model
from pretrain.tokenizer.train import train_tokenizer

PROMPT = "The people of the United States"


@pytest.fixture(scope="module")
def model(finished_run: Path) -> LoadedModel:
    return load_model(finished_run, device="cpu")


def json_of(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    """Run a command with --json and return its object."""
    capsys.readouterr()
    assert main([*args, "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def test_next_tokens_are_those_of_the_command(
    model: LoadedModel, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = json_of(capsys, "next", str(finished_run), "--prompt", PROMPT, "--top", "3")
    tokens = [token._asdict() for token in model.next_tokens(PROMPT, top=3)]
    assert tokens == expected["tokens"]


def test_score_is_that_of_the_command(
    model: LoadedModel, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PROMPT * 20
    (tmp_path / "text.txt").write_text(text)
    scores = json_of(capsys, "evaluate", str(finished_run), "--text", str(tmp_path / "text.txt"))
    (expected,) = scores["text"].values()
    score = model.score([text])
    assert not model.decoder.training  # else dropout would change what it generates next
    assert (score.tokens, score.bytes) == (expected["tokens"], expected["bytes"])
    assert score.nats == pytest.approx(expected["nats"], rel=1e-6)
    assert score.bits_per_byte == pytest.approx(expected["bits_per_byte"], rel=1e-6)


def test_generated_text_is_that_of_the_command(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--prompt", PROMPT, "--max-tokens", "20", "--n", "2"]
    expected = json_of(capsys, "generate", str(finished_run), *args)["completions"]
    model = load_model(str(finished_run), device="cpu")
    for _ in range(2):  # the weights are rearranged in memory only once
        assert model.generate(PROMPT, max_tokens=20, n=2) == expected


def test_model_knows_where_it_came_from(model: LoadedModel, finished_run: Path) -> None:
    assert model.path.parent == finished_run / "checkpoints"
    assert model.config.train.steps == 12
    assert model.checkpoint is not None
    assert model.precision == "fp32"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no model at"),
        ("empty", "is neither a run directory"),
        ("unsaved", "has no checkpoint yet"),
        ("other", "is not the tokenizer that"),
    ],
)
def test_what_is_not_a_model_is_named(
    finished_run: Path, tmp_path: Path, name: str, message: str
) -> None:
    folder = tmp_path / name
    if name != "missing":
        folder.mkdir()
    if name in ("unsaved", "other"):
        shutil.copy(finished_run / "config.yaml", folder)
    if name == "other":
        shutil.copytree(finished_run / "checkpoints", folder / "checkpoints")
        train_tokenizer([PROMPT], vocab_size=270).save(folder / "tokenizer")
    with pytest.raises(ValueError, match=message):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("name", ["../run/checkpoints/step-00000001", "checkpoints/..", "/"])
def test_a_summary_names_a_checkpoint_of_its_own_run(
    finished_run: Path, tmp_path: Path, name: str
) -> None:
    """summary.json has no hash: an edit would evaluate another model."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "checkpoint": name}))
    with pytest.raises(ValueError, match="it must be a folder in checkpoints/"):
        load_model(run, device="cpu")
