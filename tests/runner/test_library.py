"""The library as a user writes it: train on a text, load the run, generate, evaluate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pretrain
from pretrain.validation import ConfigError

SETTINGS = {
    "tokenizer.vocab_size": 270,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "model.d_model": 32,
    "model.context_length": 16,
    "train.batch_tokens": 128,
    "train.device": "cpu",
    "train.threads": 1,
}


def test_train_then_load_then_generate_and_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("The sea was calm and the sea was wide. " * 200)
    run = pretrain.train("my.txt", run="runs/sea", steps=12, settings=SETTINGS, quiet=True)
    assert capsys.readouterr().out == ""
    assert run.folder == Path("runs/sea")
    assert run.summary is not None
    assert run.summary["steps"] == 12

    model = pretrain.load_model(run.folder)
    (text,) = model.generate("The sea", max_tokens=5)
    assert pretrain.generate(model, "The sea", max_tokens=5) == [text]
    score = pretrain.evaluate(model, text="The sea was wide.")
    assert score.bytes == len("The sea was wide.")
    assert pretrain.generate(model=model, prompt="The sea", max_tokens=5) == [text]
    assert pretrain.evaluate(model=model, text="The sea was wide.") == score
    assert 0 < score.bits_per_byte < 16, f"{score.bits_per_byte} bits per byte"

    again = pretrain.train(run="runs/sea", resume=True, quiet=True)
    assert again.summary == run.summary


def test_prepare_then_train_on_the_prepared_folder(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("The sea was calm and the sea was wide. " * 200)
    data = pretrain.prepare(tmp_path / "my.txt", tmp_path / "prepared", vocab_size=270)
    assert data.manifest.vocab_size == 270


def test_invalid_settings_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        pretrain.train(steps=0, settings={"model.n_head": 2}, quiet=True)
    assert str(raised.value) == (
        "2 errors:\n"
        "  there is no model.n_head; did you mean 'model.n_heads'?\n"
        "  train.steps is 0; it must be in [1, 10^10]"
    )


def test_functions_stay_functions_when_their_packages_are_imported() -> None:
    code = (
        "import sys, pretrain; assert 'torch' not in sys.modules;"
        "import pretrain.train.config, pretrain.evaluate.config;"
        "assert callable(pretrain.train) and callable(pretrain.evaluate);"
        "assert callable(pretrain.generate) and callable(pretrain.load_model);"
        "assert pretrain.train.config.TrainConfig().seed == 1;"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'pretrain' has no attribute 'tarin'$"):
        pretrain.tarin  # noqa: B018
