"""The section `model`: every range, choice and rule between its fields."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

import pytest

from config_errors import errors_of
from pretrain.model.config import ModelConfig
from pretrain.model.families import PRESETS
from pretrain.validation import type_hints

CHOICES = {
    name: ", ".join(get_args(hint))
    for name, hint in type_hints(ModelConfig).items()
    if get_origin(hint) is Literal
}
"""The names of the values of each field that is a choice."""


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("n_layers: 0", "in [1, 10000]"),
        ("n_layers: 10001", "in [1, 10000]"),
        ("n_heads: -1", "in [1, 2^20]"),
        ("n_kv_heads: 0", "in [1, 2^20]"),
        ("d_model: 1048577", "in [1, 2^20]"),
        ("d_ff: 0", "in [1, 2^24]"),
        ("context_length: 0", "in [1, 2^24]"),
        ("rope_original_context: 0", "in [1, 2^24]"),
        ("ngram_rows: -1", "in [0, 2^40]"),
        ("longest_ngram: 9", "in [1, 8]"),
        ("induction: 9", "in [0, 8]"),
        *((f"{name}: other", f"one of {values}") for name, values in CHOICES.items()),
    ],
)
def test_values_out_of_range_are_rejected(setting: str, expected: str) -> None:
    key, value = setting.split(": ")
    shown = value if value.lstrip("-").isdigit() else repr(value)
    assert errors_of(f"model: {{{setting}}}") == [f"model.{key} is {shown}; it must be {expected}"]


@pytest.mark.parametrize(
    ("section", "messages"),
    [
        ("{family: fast, size: 0}", ["model.size is 0; it must be in [1, 1000]"]),
        ("{dropout: 1}", ["model.dropout is 1.0; it must be in [0, 1)"]),
        (
            "{norm_epsilon: 0, rope_theta: -1, rope_factor: 0, rope_low_factor: -1}",
            [
                "model.norm_epsilon is 0.0; it must be above 0",
                "model.rope_theta is -1.0; it must be above 0",
                "model.rope_factor is 0.0; it must be above 0",
                "model.rope_low_factor is -1.0; it must be above 0",
            ],
        ),
        (
            "{rope_low_factor: 5}",
            ["model.rope_low_factor is 5.0; it must be below model.rope_high_factor, 4.0"],
        ),
        (
            "{family: llama, size: 2}",
            [
                "model.size is 2; it must be empty, because model.family is llama and not fast; "
                "give n_layers, n_heads and d_model, or a preset"
            ],
        ),
        (
            "{n_heads: 3, d_model: 128}",
            ["model.d_model is 128; it must be a multiple of model.n_heads, 3"],
        ),
        (
            "{preset: gpt2-124m, n_heads: 7}",
            ["model.d_model is 768; it must be a multiple of model.n_heads, 7"],
        ),
        (
            "{n_heads: 2, d_model: 6}",
            ["model.d_model 6 / model.n_heads 2 is 3; it must be even for rotary positions"],
        ),
        (
            "{family: transformer, n_heads: 1, d_model: 33}",
            ["model.d_model is 33; it must be even for sinusoidal positions"],
        ),
        ("{n_kv_heads: 3}", ["model.n_heads is 4; it must be a multiple of model.n_kv_heads, 3"]),
        ("{n_kv_heads: 8}", ["model.n_heads is 4; it must be a multiple of model.n_kv_heads, 8"]),
        (
            "{n_layers: 9999, d_model: 1000000, n_heads: 1000}",
            [
                "a model of model.n_layers 9999, model.d_model 1000000, model.d_ff 2666688 and "
                "model.ngram_rows 0 has at least 73,326,426,624,000,000 parameters; it must have "
                "at most 10,000,000,000,000"
            ],
        ),
        (
            "{ngram_rows: 1e12}",
            [
                "a model of model.n_layers 4, model.d_model 128, model.d_ff 352 and "
                "model.ngram_rows 1000000000000 has at least 256,000,000,491,520 parameters; it "
                "must have at most 10,000,000,000,000"
            ],
        ),
        (
            "{preset: gpt2-124m, family: llama}",
            [
                "model.preset gpt2-124m is of the family gpt2, but model.family is llama; give one "
                "of the two"
            ],
        ),
        (
            "{preset: gpt3-124m}",
            ["there is no model.preset 'gpt3-124m'; did you mean 'gpt2-124m'?"],
        ),
        (
            "{preset: [big]}",
            [f"there is no model.preset ['big']; there are {', '.join(PRESETS)}"],
        ),
        (
            "{family: {a: 1}}",
            [f"model.family is {{'a': 1}}; it must be one of {CHOICES['family']}"],
        ),
    ],
)
def test_contradicting_values_are_rejected(section: str, messages: list[str]) -> None:
    assert errors_of(f"model: {section}") == messages


@pytest.mark.parametrize(
    ("text", "args", "messages"),
    [
        # Sizes of an unknown preset, and the width that goes with wrong heads, are not compared.
        (
            "model: {preset: gpt2-125m, n_heads: 5}",
            "",
            ["there is no model.preset 'gpt2-125m'; did you mean 'gpt2-124m'?"],
        ),
        (
            "model: {n_heads: many, d_model: 130, position: alibi, n_kv_heads: 3}",
            "",
            [
                "model.n_heads is 'many'; it must be a whole number",
                "model.position is 'alibi'; it must be one of learned, sinusoidal, rotary",
            ],
        ),
        (
            "model: {n_heads: -4, d_model: 130, context_length: 0}",
            "--train.batch_tokens 77",
            [
                "model.n_heads is -4; it must be in [1, 2^20]",
                "model.context_length is 0; it must be in [1, 2^24]",
            ],
        ),
        (
            "model: {family: bert, preset: gpt2-12m, n_heads: 3, n_kv_heads: 2, dropout: -1}",
            "",
            [
                "there is no model.preset 'gpt2-12m'; did you mean 'gpt2-124m'?",
                f"model.family is 'bert'; it must be one of {CHOICES['family']}",
                "model.dropout is -1.0; it must be in [0, 1)",
                "model.n_heads is 3; it must be a multiple of model.n_kv_heads, 2",
            ],
        ),
        (
            "model: {preset: llama3-8b}",
            "--model.family gpt2 --train.steps 0",
            [
                "model.preset llama3-8b is of the family llama, but model.family is gpt2; give one "
                "of the two",
                "train.steps is 0; it must be in [1, 10^10]",
            ],
        ),
    ],
)
def test_nothing_is_reported_that_only_follows_from_another_error(
    text: str, args: str, messages: list[str]
) -> None:
    assert sorted(errors_of(text, args)) == sorted(messages)
