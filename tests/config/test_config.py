"""Configs: YAML 1.2, layers, conversion, and sentences that help."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.cli import take_settings
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
from pretrain.optim import ScheduleConfig
from pretrain.optim.schedule import LRSchedule, extend


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e6", 1e6),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("true", True),
        ("~", None),
        ("", None),
        ("null", None),
        ("-1", -1),
        ("+.5", 0.5),
        (".inf", float("inf")),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_scalars_are_read_as_the_core_schema_of_yaml_1_2_says(text: str, value: Any) -> None:
    found = read_yaml(text, name="test")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "the key 'a' stands twice"),
        ("a: &x 1\nb: *x", "aliases"),
        ("a: [1", "not the YAML that is meant here"),
        ("a: !!python/object:os.system x", "not the YAML that is meant here"),
        ("[" * 3000, "nested too deeply|not the YAML"),
    ],
)
def test_yaml_that_hides_mistakes_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_yaml(text, name="config.yaml")


def test_a_preset_of_a_later_layer_is_that_model() -> None:
    recipe = {"model": {"family": "fast", "n_layers": 4, "d_model": 128, "dropout": 0.2}}
    asked = {"model": {"preset": "gpt2-124m", "n_heads": 6}}
    model = compose([recipe, asked]).model
    assert (model.family, model.n_layers, model.d_model) == ("gpt2", 12, 768)
    assert (model.n_heads, model.dropout) == (6, 0.2)


@pytest.mark.parametrize("size", [2, 5])
def test_one_dial_sets_all_sizes_of_fast(size: int) -> None:
    recipe: dict[str, dict[str, Any]] = {"model": {"family": "fast", "size": 3, "n_heads": 9}}
    dialled = compose([recipe, parse_overrides(["--model.size", str(size)])]).model
    assert (dialled.n_layers, dialled.n_heads, dialled.d_head) == (size, size + 1, 64)
    own = compose([recipe, parse_overrides(f"--model.size {size} --model.n_layers 7".split())])
    assert (own.model.n_layers, own.model.d_model) == (7, 64 * (size + 1))
    for width, heads in ((32, 1), (128, 2), (200, 2), (1152, 18)):
        wide = compose([{"model": {"family": "fast", "d_model": width}}]).model
        assert (wide.d_model, wide.n_heads) == (width, heads)
    # Another family on the command line is not the recipe's model, and has no dial.
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.step", "1"], r"there is no train.step; did you mean 'train.steps'\?"),
        (["--modle.d_model", "1"], r"there is no section 'modle'; did you mean 'model'\?"),
        (["--train.steps", "many"], "train.steps is 'many'; it must be a whole number"),
        (["--train.steps", "2.5"], "train.steps is 2.5; it must be a whole number"),
        (["--train.steps", "true"], "train.steps is True; it must be a whole number"),
        (["--train.steps", "0"], "train.steps is 0; it must be at least 1"),
        (
            ["--model.family", "bert"],
            "model.family 'bert' is not one of transformer, gpt, gpt2, llama",
        ),
        (["--model.preset", "gpt9"], "model.preset 'gpt9' is not one of transformer-base"),
        (["--optimizer.learning_rate", "-1"], "learning_rate is -1.0; it must be a number above 0"),
        (["--optimizer.learning_rate", ".nan"], "learning_rate is nan; it must be a finite number"),
        (["--schedule.name", "steep"], "schedule.name is 'steep'; it must be one of cosine"),
        (["--model.bias", "yes"], "model.bias is 'yes'; it must be one of none, all"),
        (["--report.to", "mlflow"], "mlflow"),
        (["--train.steps"], "--train.steps needs a value"),
        (["steps", "3"], "'steps' is not understood"),
    ],
)
def test_mistakes_are_named_with_what_would_be_legal(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose([parse_overrides(words)])


def test_values_are_converted_as_the_fields_say() -> None:
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


def test_the_past_of_a_schedule_is_read_back_equal(tmp_path: Path) -> None:
    old = LRSchedule(ScheduleConfig(warmup_steps=10, final_fraction=0.1), 1e-3 / 3, 100)
    new = extend(
        old, start_step=100, steps=200, overrides={"name": "cosine", "learning_rate": 7e-4}
    )
    config = replace(compose([]), schedule=new.schedule)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert compose([read_file(path)]) == config
    path.write_text("schedule: {history: [{until_step: 3}]}")
    with pytest.raises(ValueError, match=r"schedule\.history has an entry without a steps"):
        compose([read_file(path)])


@given(value=st.floats(min_value=1e-300, max_value=1e300))
def test_every_rate_survives_the_file(value: float) -> None:
    config = compose([{"optimizer": {"learning_rate": value}}])
    again = read_yaml(to_yaml(config), name="test")
    assert again["optimizer"]["learning_rate"] == value
    assert to_dict(compose([again])) == to_dict(config)


def test_a_file_that_is_no_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for content, message in (
        (b"\xff\xfe", "not UTF-8"),
        (b"- 1", "sections such as"),
        (b"train: 3", "keys with values"),
        (b"a" * (1 << 21), "not a config"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            compose([read_file(path)])


def test_settings_are_told_from_arguments() -> None:
    words = "my.txt --train.steps 20 --run out --model.d_model=64 --resume --train.minutes"
    settings, rest = take_settings(words.split())
    assert settings == ["--train.steps", "20", "--model.d_model=64", "--train.minutes"]
    assert rest == ["my.txt", "--run", "out", "--resume"]


def test_a_renamed_key_names_its_new_name() -> None:
    with pytest.raises(ValueError, match=r"^optimizer") as raised:
        compose([{"optimizer": {"tuned" + "_width": 128}}])
    assert str(raised.value) == (
        "optimizer.tuned" + "_width is now optimizer.base_width: this config was written by an "
        "older pretrain; rename the key"
    )


def test_every_renamed_key_is_a_key_today() -> None:
    keys = {f"{name}.{f.name}" for name, kind in SECTIONS.items() for f in fields(kind)}
    assert set(RENAMED_KEYS.values()) <= keys
    assert not set(RENAMED_KEYS) & keys
