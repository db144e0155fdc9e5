"""Families and presets: published sizes, counting of parameters, rejected architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model_variants import VARIANTS, V, small_config
from pretrain.model.config import ModelConfig, model_defaults, n_parameters
from pretrain.model.decoder import Decoder
from pretrain.model.families import PRESETS

# GPT-2's four sizes as counted in its released weights, GPT's in its own, Llama's as in its model
# cards and released weights. For `transformer` nobody published a decoder alone: the count is that
# of table 3 of the paper for one stack of six, without the attention to an encoder.
PARAMETERS = {
    "transformer-base": (37_000, 37_846_016),
    "transformer-big": (37_000, 113_440_768),
    "gpt": (40_478, 116_534_784),
    "gpt2-124m": (50_257, 124_439_808),
    "gpt2-355m": (50_257, 354_823_168),
    "gpt2-774m": (50_257, 774_030_080),
    "gpt2-1558m": (50_257, 1_557_611_200),
    "llama-7b": (32_000, 6_738_415_616),
    "llama-13b": (32_000, 13_015_864_320),
    "llama-33b": (32_000, 32_528_943_616),
    "llama-65b": (32_000, 65_285_660_672),
    "llama2-7b": (32_000, 6_738_415_616),
    "llama2-13b": (32_000, 13_015_864_320),
    "llama2-70b": (32_000, 68_976_648_192),
    "llama3-8b": (128_256, 8_030_261_248),
    "llama3-70b": (128_256, 70_553_706_496),
    "llama3.1-8b": (128_256, 8_030_261_248),
    "llama3.1-70b": (128_256, 70_553_706_496),
    "llama3.1-405b": (128_256, 405_853_388_800),
    "llama3.2-1b": (128_256, 1_235_814_400),
    "llama3.2-3b": (128_256, 3_212_749_824),
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    vocab_size, parameters = PARAMETERS[preset]
    config = ModelConfig(
        **{"context_length": 512, **model_defaults({"preset": preset}), "preset": preset}
    )
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size=vocab_size)
    assert sum(p.numel() for p in decoder.parameters()) == parameters
    assert n_parameters(config, vocab_size=vocab_size) == parameters
    row = f"| {preset} | {parameters:,} | {vocab_size:,} |"
    page = Path(__file__).parents[2] / "docs/internals/model.md"
    assert row in page.read_text(encoding="utf-8")


def test_every_preset_has_a_published_number_of_parameters() -> None:
    assert set(PRESETS) == set(PARAMETERS)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_n_parameters_equals_the_built_decoder(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size=V)
    assert n_parameters(config, vocab_size=V) == sum(p.numel() for p in decoder.parameters())


def test_a_preset_of_another_family_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"gpt2-124m is of the family gpt2, but .* llama"):
        model_defaults({"preset": "gpt2-124m", "family": "llama"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "d_model is 32; it must be a multiple of model.n_heads, 5"),
        ({"n_kv_heads": 3}, "n_heads is 4; it must be a multiple of model.n_kv_heads, 3"),
        ({"n_layers": 0}, r"n_layers is 0; it must be in \[1, 10000\]"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"d_model": 36}, "must be even for rotary"),
        ({"rope_low_factor": 4.0}, "rope_low_factor is 4.0; it must be below"),
        ({"rope_factor": 0.0}, "rope_factor is 0.0; it must be above 0"),
        ({"position": "sinusoidal", "d_model": 33, "n_heads": 3}, "must be even for sinusoidal"),
    ],
)
def test_impossible_architectures_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config("llama", **changes)
