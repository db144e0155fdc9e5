"""`pretrain mix`: a folder with the weights of several models that is a MODEL like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.cli import main
from pretrain.runner.open import load_model
from pretrain.runner.text import text_of_run
from tiny import TINY, write_llama

PROMPT = "The people of the United States"


def json_of(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    """Run a command with --json and return its object."""
    capsys.readouterr()
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def probabilities_of(path: Path) -> dict[int, float]:
    return {t.id: t.probability for t in load_model(path, device="cpu").next_tokens(PROMPT, top=9)}


@pytest.fixture(scope="module")
def mix(finished_run: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts of one of family `fast` and one of `gpt2`, of the same text; both runs are gone
    where it looks for them."""
    folder = tmp_path_factory.mktemp("mix")
    for name, run in (("fast", finished_run), ("gpt2", finished)):
        shutil.copytree(run, folder / name)
    args = ["mix", str(folder / "fast"), str(folder / "gpt2"), "--out", str(folder / "mix")]
    assert main([*args, "--weights", "3", "1"]) == 0
    shutil.rmtree(folder / "fast")
    shutil.rmtree(folder / "gpt2")
    return folder / "mix"


def test_it_predicts_the_mean_of_its_parts(mix: Path, finished_run: Path, finished: Path) -> None:
    first, second = (
        {t.id: t.probability for t in load_model(run, device="cpu").next_tokens(PROMPT, top=400)}
        for run in (finished_run, finished)
    )
    for id_, probability in probabilities_of(mix).items():
        expected = 0.75 * first[id_] + 0.25 * second[id_]
        assert probability == pytest.approx(expected, abs=1e-6)


def test_its_parts_are_named_in_words(mix: Path) -> None:
    parts = json.loads((mix / "mix.json").read_text())["parts"]
    assert [part["weight"] for part in parts] == [0.75, 0.25]
    assert [Path(part["path"]).parts[-3] for part in parts] == ["fast", "gpt2"]
    assert [part["model"]["family"] for part in parts] == ["fast", "gpt2"]


def test_it_is_a_model_like_any_other(
    mix: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The held-out text of the parts is that of the mix, since they share it."""
    (row,) = json_of(capsys, "evaluate", str(mix))["text"].values()
    (own,) = json_of(capsys, "evaluate", str(finished_run))["text"].values()
    assert (row["tokens"], row["bytes"]) == (own["tokens"], own["bytes"])
    assert row["nats"] != own["nats"]
    (text,) = json_of(capsys, "generate", str(mix), "--max-tokens", "40")["completions"]
    assert text == load_model(mix).generate(max_tokens=40)[0]
    ask = ("ask", str(mix), "--task", "summarize", "--input", PROMPT)
    assert "answer" in json_of(capsys, *ask)


def test_texts_that_the_parts_do_not_share_are_not_scored(
    mix: Path, finished: Path, tmp_path: Path
) -> None:
    """The second part has read no text that is known here: only its weights were imported."""
    assert main(["export", str(finished), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    args = ["mix", str(finished), str(tmp_path / "hf"), "--out", str(tmp_path / "mix")]
    assert main(args) == 0
    text_of_run(load_model(mix), print)
    with pytest.raises(ValueError, match="there is no training text"):
        text_of_run(load_model(tmp_path / "mix"), print)


def test_models_of_two_tokenizers_are_rejected_by_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    other = write_llama(tmp_path / "other", context_length=32)
    assert main(["mix", str(finished), str(other), "--out", str(tmp_path / "mix")]) == 2
    message = capsys.readouterr().err
    assert "must have the same tokenizer" in message
    assert str(finished) in message
    assert str(other) in message
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize("weights", [["1"], ["1", "0"], ["1", "nan"]])
def test_wrong_weights_are_rejected(
    finished: Path,
    tmp_path: Path,
    weights: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "mix")
    assert main(["mix", str(finished), str(finished), "--out", out, "--weights", *weights]) == 2
    assert "must be 2 numbers above 0" in capsys.readouterr().err
    assert main(["mix", str(finished), "--out", out]) == 2
    assert "is one model; mix needs two or more" in capsys.readouterr().err


def test_what_a_mix_cannot_do_is_refused_with_what_would_do(
    mix: Path, corpus: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = str(mix / "checkpoints" / "step-00000000"), str(tmp_path / "out")
    for args in (
        ["export", str(mix), "--format", "hf", "--out", out],
        ["export", checkpoint, "--format", "gguf", "--out", out],
        ["train", str(corpus), "--train.init_from", str(mix), "--run", out],
        ["train", str(corpus), "--train.init_from", checkpoint, "--run", out],
        ["train", "--resume", "--run", str(mix)],
        ["extend", str(mix), "--train.steps", "100"],
        ["trace", str(mix), "--step", "1"],
        ["verify", str(mix)],
        ["mix", str(mix), str(finished), "--out", out],
    ):
        assert main(args) == 2, args
        message = capsys.readouterr().err
        assert "is a mix of models" in message
        assert f"--train.teacher {mix}" in message
    assert not (tmp_path / "out").exists()


def test_a_changed_mix_is_not_opened(mix: Path, copy_run: Callable[..., Path]) -> None:
    edited = copy_run(mix, "edited")
    text = (edited / "mix.json").read_text()
    (edited / "mix.json").write_text(text.replace("0.25", "0.35"))
    with pytest.raises(ValueError, match=r"mix\.json is not that of the mix"):
        load_model(edited)

    damaged = copy_run(mix, "damaged")
    (file,) = (damaged / "checkpoints" / "step-00000000").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="was changed after it was written"):
        load_model(damaged)


def test_counts_of_the_training_text_are_a_part(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.txt").write_text("The people of the United States are free. " * 9)
    out = str(tmp_path / "mix")
    words = ["mix", str(finished_run), "--counts", "4", "--fit", str(tmp_path / "own.txt")]
    parts = json_of(capsys, *words, "--out", out)["parts"]
    assert [part["path"] for part in parts[1:]] == [f"counts of {load_model(finished_run).path}"]
    assert sum(part["weight"] for part in parts) == pytest.approx(1)
    assert parts[1]["weight"] > 0.5  # the network had a few steps
    assert len(parts[1]["sizes"]) == 4
    scores = [
        json_of(capsys, "evaluate", name)["text"]["held-out split"]["bits_per_byte"]
        for name in (str(finished_run), out)
    ]
    assert scores[1] < 0.9 * scores[0]
    assert main(["generate", out, "--max-tokens", "9"]) == 0
    assert main(["next", out, "--prompt", PROMPT]) == 0


def test_counts_need_the_text_of_the_first_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs").mkdir()
    write_llama(tmp_path / "theirs", context_length=16)
    words = ["mix", str(tmp_path / "theirs"), "--counts", "3", "--out", str(tmp_path / "mix")]
    assert main(words) == 2
    assert "was not trained here, so there is no training text" in capsys.readouterr().err
    assert not (tmp_path / "mix").exists()


def test_counts_that_are_too_long_are_rejected(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["mix", str(finished_run), "--counts", "16", "--out", str(tmp_path / "mix")]
    assert main(words) == 2
    assert "--counts is 16; it must be at most " in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "mix").exists()


def test_weights_are_fitted_on_any_file_that_is_read_as_text(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jsonl").write_text('{"text": "We are free. "}\n' * 5)
    words = ["mix", str(finished_run), "--counts", "2", "--out", str(tmp_path / "mix")]
    parts = json_of(capsys, *words, "--fit", str(tmp_path / "own.jsonl"))["parts"]
    assert parts[0]["weight"] != parts[1]["weight"]
    again = [*words[:-1], str(tmp_path / "again"), "--fit"]
    assert main([*again, str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert main([*again, str(tmp_path / "own.jsonl"), "--weights", "1", "2"]) == 2
    assert "--weights must come without --fit" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tail(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Checkpoints of one run."""
    run = tmp_path_factory.mktemp("tail") / "run"
    words = [*TINY, "--train.steps", "6", "--train.save_every", "2", "--train.keep_every", "2"]
    assert main(["train", str(corpus), *words, "--run", str(run)]) == 0
    return [str(run / "checkpoints" / f"step-{step:08d}") for step in (2, 4, 6)]


def test_an_average_of_weights_is_an_ordinary_model(
    tail: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mean"
    words = ["mix", *tail, "--average", "weights", "--weights", "2", "1", "1"]
    parts = json_of(capsys, *words, "--out", str(out))["parts"]
    assert [part["weight"] for part in parts] == [0.5, 0.25, 0.25]
    saved = json.loads((out / "mix.json").read_text())
    assert saved == {"average": "weights", "parts": parts}
    models = [load_model(path, device="cpu").decoder for path in tail]
    for name, mean in load_model(out, device="cpu").decoder.named_parameters():
        a, b, c = (model.get_parameter(name).double() for model in models)
        assert torch.equal(mean, (a / 2 + b / 4 + c / 4).float()), name
    (row,) = json_of(capsys, "evaluate", str(out))["text"].values()
    assert row["tokens"] > 0  # the held-out text of its parts
    assert main(["generate", str(out), "--max-tokens", "5"]) == 0
    assert main(["export", str(out), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    further = ["train", str(corpus), "--train.init_from", str(out), "--train.steps", "2"]
    further += ["--train.device", "cpu", "--train.threads", "1", "--train.batch_tokens", "256"]
    assert main([*further, "--run", str(tmp_path / "further")]) == 0
    again = ["mix", str(out), tail[0], "--average", "weights", "--out", str(tmp_path / "again")]
    assert main(again) == 0


def test_weights_that_cannot_be_averaged_are_rejected(
    tail: list[str],
    mix: Path,
    finished: Path,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, out = tail[0], ["--average", "weights", "--out", str(tmp_path / "out")]
    for words, expected in (
        ([str(finished_run), str(finished)], "must have the same architecture"),
        ([str(finished_run), str(finished)], "model.family: fast -> gpt2"),
        ([own, str(write_llama(tmp_path, context_length=32))], "must have the same tokenizer"),
        ([own, "--counts", "3"], "without --counts"),
        ([own, own, "--fit", own], "without --fit"),
        ([own, str(mix)], "is a mix of models"),
    ):
        assert main(["mix", *words, *out]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
