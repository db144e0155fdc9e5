"""Reading YAML: version 1.2's core schema, and what is rejected because it hides errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.config import parse_overrides, read_file, read_yaml


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
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: Any) -> None:
    result = read_yaml(text, name="test")
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\na: 2", "line 2: duplicate key 'a'"),
        ("a:\n b: 1\n  c: 2", "or indented further than that"),
        ("train: {steps: 1}\ntrain: {seed: 2}", "duplicate key 'train'"),
        ("a: &x 1\nb: *x", "aliases (*) and tags (!) are not supported"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases (*) and tags (!) are not supported"),
        ("a: !!python/object:os.system x", "aliases (*) and tags (!) are not supported"),
        ("a: !!timestamp x", "aliases (*) and tags (!) are not supported"),
        ("a: [1", "expected ',' or ']', but got '<stream end>'"),
        ("a:\n\tb: 1", "line 2: it is indented with a tab; it must be indented with spaces"),
        ("a:\n  b 1\n  c: 2", "line 3: a colon too many, or none in the line before"),
        ("a:\n  b: 1\n c: 2", "line 3: it must be indented as the other keys of its section are"),
        ("a: 1\nb\nc: 1", "line 3: a colon is missing in the line before"),
        ("? [a, b]\n: 1", "found unhashable key"),
        ("a: 1\n---\nb: 2", "expected a single document in the stream"),
        ("%YAML 9.9\n---\na: 1", "found incompatible YAML document"),
        ("a: 1\0", "special characters are not allowed"),
        (f"a: {'9' * 10_000}", "a number of 10000 characters"),
    ],
)
def test_invalid_yaml_is_rejected_with_the_place(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r"^config.yaml is not valid YAML: ") as raised:
        read_yaml(text, name="config.yaml")
    assert problem in str(raised.value)
    assert "unicode string" not in str(raised.value) or "special characters" in problem
    assert "line " in str(raised.value) or "position " in str(raised.value)


def test_deep_nesting_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^config.yaml is nested too deeply$"):
        read_yaml("[" * 10_000, name="config.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- train\n- model", "PATH contains ['train', 'model']; it must have sections like"),
        (b"[]", "PATH contains []; it must have sections like `train:`"),
        (b"train", "PATH contains 'train'; it must have sections like `train:`"),
        (b"\xff\xfe", "PATH is not UTF-8 text: 'utf-8' codec can't decode byte 0xff"),
        (b"# " + b"x" * (1 << 20), "PATH has more than 262,144 bytes: not a config"),
    ],
)
def test_a_file_without_sections_is_rejected(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r".") as raised:
        read_file(path)
    assert str(raised.value).startswith(message.replace("PATH", str(path)))


def test_an_empty_file_is_an_empty_layer(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# nothing yet\n")
    assert read_file(path) == {}


def test_invalid_args_are_reported_all_at_once() -> None:
    with pytest.raises(ValueError, match=r"^4 errors:") as raised:
        parse_overrides("steps 3 --train.seed [1 --model.n_heads".split())
    message = str(raised.value)
    assert "'steps' is not a setting; settings look like --train.steps 100" in message
    assert "'3' is not a setting; settings look like --train.steps 100" in message
    assert "--train.seed is not valid YAML: line 1: while parsing a flow sequence" in message
    assert message.endswith("--model.n_heads needs a value after it")
