"""What a config says of names that it does not have: those of other programs, of other sections,
and of sections written flat. Before, `train.learning_rate` was answered with `train.minutes`."""

from __future__ import annotations

from pathlib import Path

import pytest

from config_errors import errors_of
from pretrain.cli import main
from pretrain.config import _OTHER_NAMES, SECTIONS
from pretrain.validation import type_hints

# From nanoGPT's train.py and model.py, litgpt's Config and TrainArgs, transformers' LlamaConfig,
# GPT2Config and TrainingArguments (read in 2026).
NAMES = {
    "n_embd": "model.d_model",
    "hidden_size": "model.d_model",
    "n_layer": "model.n_layers",
    "num_hidden_layers": "model.n_layers",
    "n_head": "model.n_heads",
    "num_key_value_heads": "model.n_kv_heads",
    "intermediate_size": "model.d_ff",
    "block_size": "model.context_length",
    "max_position_embeddings": "model.context_length",
    "lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "grad_clip": "optimizer.clip",
    "max_grad_norm": "optimizer.clip",
    "warmup_iters": "schedule.warmup_steps",
    "max_iters": "train.steps",
    "max_steps": "train.steps",
    "batch_size": "train.batch_tokens",
    "eval_interval": "train.evaluate_every",
    "save_steps": "train.save_every",
    "dtype": "train.precision",
    "vocab": "tokenizer.vocab_size",
    "vocab_size": "tokenizer.vocab_size",
    "dataset": "data.source",
    "steps": "train.steps",
    "minutes": "train.minutes",
}


@pytest.mark.parametrize(("name", "setting"), NAMES.items())
def test_a_name_of_another_program_or_section_is_answered_with_ours(
    name: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    section = "data" if setting.startswith("report") else "report"
    question = f"did you mean {setting!r}?"
    assert errors_of(f"{section}: {{{name}: 3}}") == [f"there is no {section}.{name}; {question}"]
    section, _, key = setting.partition(".")
    assert errors_of(f"{name}: 3") == [
        f"there is no section {name!r}; write `{section}:`, and indented below it `{key}: 3`"
    ]
    capsys.readouterr()
    assert main(["train", f"--{name.replace('_', '-')}", "3"]) == 2
    assert f"did you mean '--{setting}'? See pretrain train --help" in capsys.readouterr().err


def test_all_answers_are_settings() -> None:
    for name, setting in _OTHER_NAMES.items():
        section, _, key = setting.partition(".")
        assert key in type_hints(SECTIONS[section])
        assert not any(name in type_hints(kind) for kind in SECTIONS.values()), name


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "train.steps: 20",
            [
                "there is no section 'train.steps'; write `train:`, and indented below it "
                "`steps: 20`"
            ],
        ),
        # What the section would have said is not missed.
        ("training: {steps: 20}", ["there is no section 'training'; did you mean 'train'?"]),
        (
            "train:\n  steps 20",
            ["train is 'steps 20'; it must be a section of keys with values, such as `steps: 20`"],
        ),
        (
            "model: {family: gpt3}",
            [
                "model.family is 'gpt3'; it must be one of transformer, gpt, gpt2, llama, fast; "
                "did you mean 'gpt'?"
            ],
        ),
    ],
)
def test_a_section_that_is_none_is_one_error(
    text: str, messages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors_of(text) == messages
    config = tmp_path / "mine.yaml"
    config.write_text(text + ("\ntrain: {steps: 1}" if "family" in text else ""))
    assert main(["train", str(config)]) == 2
    assert capsys.readouterr().err == f"pretrain: {messages[0]}\n"


def test_an_option_is_answered_with_the_nearest_of_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", "run", "--max-token", "3"]) == 2
    assert "did you mean '--max-tokens'? See pretrain generate" in capsys.readouterr().err
