"""Layers of a config, conversion of values, and writing it to YAML and back."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import (
    RENAMED_KEYS,
    SECTIONS,
    compose,
    parse_overrides,
    read_file,
    read_yaml,
    to_dict,
    to_yaml,
)
from pretrain.optim.config import ScheduleConfig
from pretrain.optim.schedule import LRSchedule, extend


def test_a_preset_of_a_later_layer_replaces_the_sizes_of_a_recipe() -> None:
    recipe = {"model": {"family": "fast", "n_layers": 4, "d_model": 128, "dropout": 0.2}}
    requested = {"model": {"preset": "gpt2-124m", "n_heads": 6}}
    model = compose([recipe, requested]).model
    assert (model.family, model.n_layers, model.d_model) == ("gpt2", 12, 768)
    assert (model.n_heads, model.dropout) == (6, 0.2)


@pytest.mark.parametrize("size", [2, 5])
def test_model_size_sets_all_sizes_of_fast(size: int) -> None:
    recipe: dict[str, dict[str, Any]] = {"model": {"family": "fast", "size": 3, "n_heads": 9}}
    sized = compose([recipe, parse_overrides(["--model.size", str(size)])]).model
    assert (sized.n_layers, sized.n_heads, sized.d_head) == (size, size + 1, 64)
    own = compose([recipe, parse_overrides(f"--model.size {size} --model.n_layers 7".split())])
    assert (own.model.n_layers, own.model.d_model) == (7, 64 * (size + 1))
    for width, heads in ((32, 1), (128, 2), (200, 2), (1152, 18)):
        wide = compose([{"model": {"family": "fast", "d_model": width}}]).model
        assert (wide.d_model, wide.n_heads) == (width, heads)
    # Another family on the command line is another model, which has no size.
    other = parse_overrides(["--model.family", "gpt2"])
    assert compose([{"model": {"family": "fast", "size": 3}}, other]).model.size is None
    preset = parse_overrides(["--model.preset", "gpt2-124m"])
    assert compose([recipe, preset]).model.d_model == 768


def test_later_layers_win_and_a_preset_is_the_lowest() -> None:
    file: dict[str, dict[str, Any]] = {
        "model": {"preset": "gpt2-124m", "n_layers": 3},
        "train": {"minutes": 5},
    }
    config = compose([file, parse_overrides(["--model.n_layers", "2", "--train.seed=7"])])
    assert config.model.family == "gpt2"
    assert config.model.n_layers == 2
    assert config.model.d_model == 768
    assert config.model.position == "learned"
    assert config.train.seed == 7


def test_minutes_on_the_command_line_replace_steps_of_the_file() -> None:
    assert compose([{"train": {"steps": 9}}, {"train": {"minutes": 1}}]).train.steps is None
    both = compose([{"train": {"minutes": 1}}, {"train": {"steps": 9}}]).train
    assert both.steps == 9


def test_values_are_converted_to_the_types_of_fields() -> None:
    words = "--train.batch_tokens 1e4 --optimizer.clip 1 --report.to tensorboard,wandb"
    config = compose([parse_overrides([*words.split(), "--data.source", "2024"])])
    assert config.train.batch_tokens == 10_000
    assert type(config.optimizer.clip) is float
    assert config.report.to == ("tensorboard", "wandb")
    assert config.data.source == "2024"


def test_a_written_config_is_read_back_equal(tmp_path: Path) -> None:
    config = compose(
        [{"model": {"preset": "llama3-8b"}, "optimizer": {"epsilon": 1e-10, "learning_rate": 3e-4}}]
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert compose([read_file(path)]) == config


def test_the_history_of_a_schedule_is_read_back_equal(tmp_path: Path) -> None:
    old = LRSchedule(ScheduleConfig(warmup_steps=10, final_fraction=0.1), 1e-3 / 3, 100)
    new = extend(
        old, start_step=100, steps=200, overrides={"name": "cosine", "learning_rate": 7e-4}
    )
    config = replace(compose([]), schedule=new.schedule)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert compose([read_file(path)]) == config


@given(value=st.floats(min_value=1e-300, max_value=1e300))
def test_every_learning_rate_is_read_back_equal(value: float) -> None:
    config = compose([{"optimizer": {"learning_rate": value}}])
    again = read_yaml(to_yaml(config), name="test")
    assert again["optimizer"]["learning_rate"] == value
    assert to_dict(compose([again])) == to_dict(config)


def test_settings_are_separated_from_other_args() -> None:
    words = "my.txt --train.steps 20 --run out --model.d_model=64 --resume"
    others: list[str] = []
    layer = parse_overrides(words.split(), others=others)
    assert layer == {"train": {"steps": 20}, "model": {"d_model": 64}}
    assert others == ["my.txt", "--run", "out", "--resume"]


def test_a_renamed_key_names_its_new_name() -> None:
    with pytest.raises(ValueError, match=r"^there is no optimizer") as raised:
        compose([{"optimizer": {"tuned" + "_width": 128}}])
    assert str(raised.value) == (
        "there is no optimizer.tuned_width; it is optimizer.base_width now, rename the key"
    )


def test_every_renamed_key_is_a_key_today() -> None:
    keys = {f"{name}.{f.name}" for name, kind in SECTIONS.items() for f in fields(kind)}
    assert set(RENAMED_KEYS.values()) <= keys
    assert not set(RENAMED_KEYS) & keys
