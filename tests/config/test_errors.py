"""Errors in general: unknown names, wrong types, all of them at once, before torch is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tracemalloc
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config_errors import errors_in, errors_of
from pretrain.config import SECTIONS, compose
from pretrain.model.config import ModelConfig
from pretrain.tokenizer.config import TokenizerConfig
from pretrain.train.config import TrainConfig

ALL_SECTIONS = ", ".join(SECTIONS)


@pytest.mark.parametrize(
    ("text", "args", "messages"),
    [
        ("modelx: {a: 2}", "", ["there is no section 'modelx'; did you mean 'model'?"]),
        ("Train: {steps: 1}", "", ["there is no section 'Train'; did you mean 'train'?"]),
        ("wandb: {}", "", [f"there is no section 'wandb'; there are {ALL_SECTIONS}"]),
        ("1: {a: 2}", "", [f"there is no section 1; there are {ALL_SECTIONS}"]),
        ("~: {a: 2}", "", [f"there is no section empty; there are {ALL_SECTIONS}"]),
        ("<<: {train: {}}", "", [f"there is no section '<<'; there are {ALL_SECTIONS}"]),
        ("train: {step: 1}", "", ["there is no train.step; did you mean 'train.steps'?"]),
        ("train: {1: 2}", "", ["there is no train.1; did you mean 'train.seed'?"]),
        (
            'train: {"a\\nb": 2}',
            "",
            [r"there is no train.a\nb; did you mean 'train.threads'?"],
        ),
        (
            "report: {aim: 1, 'kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk'"
            ": 1}",
            "--train.stpes 5 --modelx.d_model 3 --train.steps.more 5",
            [
                "there is no section 'modelx'; did you mean 'model'?",
                "there is no train.stpes; did you mean 'train.steps'?",
                "there is no train.steps.more; did you mean 'train.steps'?",
                "there is no report.aim; did you mean 'report.to'?",
                f"there is no report.{'k' * 66}; there are report.to",
            ],
        ),
        # What depends on the key that was meant is not checked.
        (
            "model: {n_head: 3, d_model: 130}",
            "",
            ["there is no model.n_head; did you mean 'model.n_heads'?"],
        ),
        ("", "--train.batch-tokens 0", ["train.batch_tokens is 0; it must be in [1, 10^10]"]),
        ("train: 3", "", ["train is 3; it must be a section of keys with values"]),
        ("train: [steps]", "", ["train is ['steps']; it must be a section of keys with values"]),
        (
            "train:\nmodel: 5\noptimizer: {clip: -1}",
            "--model.d_model 130",
            [
                "train is empty; it must be a section of keys with values",
                "model is 5; it must be a section of keys with values",
                "optimizer.clip is -1.0; it must be at least 0",
            ],
        ),
    ],
)
def test_unknown_names_are_reported_with_the_nearest(
    text: str, args: str, messages: list[str]
) -> None:
    assert errors_of(text, args) == messages


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train: {steps: many}", "train.steps is 'many'; it must be a whole number"),
        ('train: {steps: "3"}', "train.steps is '3'; it must be a whole number, without quotes"),
        ('train: {minutes: "2.5"}', "train.minutes is '2.5'; it must be a number, without quotes"),
        ("train: {steps: 2.5}", "train.steps is 2.5; it must be a whole number"),
        ("train: {steps: .nan}", "train.steps is nan; it must be a whole number"),
        ("train: {steps: 1_000}", "train.steps is '1_000'; it must be a whole number"),
        ("train: {steps: [1, 2]}", "train.steps is [1, 2]; it must be a whole number"),
        ("train: {steps: {a: 1}}", "train.steps is {'a': 1}; it must be a whole number"),
        ("train: {seed: ~}", "train.seed is empty; it must be a whole number"),
        ("model: {n_heads: true}", "model.n_heads is True; it must be a whole number"),
        ("model: {dropout: false}", "model.dropout is False; it must be a number"),
        ("train: {minutes: 5m}", "train.minutes is '5m'; it must be a number"),
        ("train: {minutes: .inf}", "train.minutes is inf; it must be a finite number"),
        ("optimizer: {clip: 1e400}", "optimizer.clip is inf; it must be a finite number"),
        ("train: {deterministic: 1}", "train.deterministic is 1; it must be true or false"),
        ("model: {tied_head: yes}", "model.tied_head is 'yes'; it must be true or false"),
        ("train: {compile: true}", "train.compile is True; it must be one of auto, on, off"),
        ("train: {compile: [on]}", "train.compile is ['on']; it must be one of auto, on, off"),
        ("optimizer: {name: ~}", "optimizer.name is empty; it must be one of adamw, muon"),
        ("data: {source: ~}", "data.source is empty; it must be a text"),
        ("data: {source: {path: a}}", "data.source is {'path': 'a'}; it must be a text"),
        (
            "report: {to: [[wandb]]}",
            "report.to[0] is ['wandb']; it must be one of tensorboard, wandb",
        ),
        (
            "train: {steps: 1e300}",
            "train.steps has more than 100 digits; it must be a smaller number",
        ),
        (
            f"train: {{steps: {'x' * 5000}}}",
            f"train.steps is '{'x' * 76}...; it must be a whole number",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_rejected(setting: str, message: str) -> None:
    assert errors_of(setting) == [message]


def test_errors_of_all_sections_are_reported_at_once() -> None:
    text = (
        "data: {val_fraction: half}\ncorpus: {remove_overlap: 2}\ntokenizer: {vocab_size: big}\n"
        "model: {n_heads: 0, d_modelx: 3}\nschedule: {name: 3}\ntrain: {seed: a}\n"
    )
    assert errors_of(text, "--optimizer.clip -1 --train.stepz 4 --report.to mlflow") == [
        "data.val_fraction is 'half'; it must be a number",
        "corpus.remove_overlap is 2; it must be true or false",
        "tokenizer.vocab_size is 'big'; it must be a whole number",
        "there is no model.d_modelx; did you mean 'model.d_model'?",
        "model.n_heads is 0; it must be in [1, 2^20]",
        "optimizer.clip is -1.0; it must be at least 0",
        "schedule.name is 3; it must be one of cosine, linear, wsd, constant, inverse_sqrt",
        "there is no train.stepz; did you mean 'train.steps'?",
        "train.seed is 'a'; it must be a whole number",
        "report.to is 'mlflow'; it must be one of tensorboard, wandb",
    ]


def test_a_command_line_corrects_a_part_of_a_file() -> None:
    text = "model: {n_heads: 0}\ntrain: {steps: many, seed: -1}"
    assert errors_of(text, "--model.n_heads 2 --train.steps 3") == [
        "train.seed is -1; it must be in [0, 2^63)"
    ]
    assert errors_of("model: {d_model: 128}", "--model.n_heads 3") == [
        "model.d_model is 128; it must be a multiple of model.n_heads, 3"
    ]


def test_one_error_is_a_sentence_and_several_are_a_list() -> None:
    with pytest.raises(ValueError, match=r"^train.steps is 0; it must be in \[1, 10\^10\]$"):
        compose([{"train": {"steps": 0}}])
    with pytest.raises(ValueError, match="errors") as raised:
        compose([{"train": {"steps": 0}, "model": {"n_heads": 0}}, {"train": {"steps": 0}}])
    assert str(raised.value) == (
        "2 errors:\n"
        "  model.n_heads is 0; it must be in [1, 2^20]\n"
        "  train.steps is 0; it must be in [1, 10^10]"
    )


def test_a_config_class_alone_reports_all_its_errors_too() -> None:
    with pytest.raises(ValueError, match="errors") as raised:
        ModelConfig(n_layers=0, n_heads=0)
    assert str(raised.value) == (
        "2 errors:\n"
        "  model.n_layers is 0; it must be in [1, 10000]\n"
        "  model.n_heads is 0; it must be in [1, 2^20]"
    )
    with pytest.raises(ValueError, match=r"^train.steps is 0; it must be in \[1, 10\^10\]$"):
        TrainConfig(steps=0)
    size: Any = "big"
    with pytest.raises(
        ValueError, match=r"^tokenizer.vocab_size is 'big'; it must be a whole number$"
    ):
        TokenizerConfig(vocab_size=size)


def test_a_valid_config_equals_what_its_classes_construct() -> None:
    sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "d_model": 64}
    config = compose([{"model": sizes, "train": {"steps": 5}}])
    assert config.model == ModelConfig(**sizes)
    assert hash(config.train) == hash(TrainConfig(steps=5))


def test_thousands_of_errors_are_reported_in_a_second() -> None:
    wrong = {"train": {f"step_{number}": 1 for number in range(3000)}}
    began = time.process_time()  # of this process, so that a busy machine changes nothing
    messages = errors_in(wrong)
    seconds = time.process_time() - began
    assert seconds < 1, f"{seconds:.2f} s"
    assert len(messages) == 3000
    assert messages[0] == "there is no train.step_0; did you mean 'train.steps'?"
    assert messages[-1] == "there is no train.step_2999"


@pytest.mark.parametrize(
    "text",
    [
        "model: {n_layers: 9999, d_model: 1000000, n_heads: 1000}",
        "model: {ngram_rows: 1e12}",
        "train: {batch_tokens: 1000000000000000000}\nmodel: {context_length: 7}",
    ],
)
def test_nothing_is_allocated_for_absurd_sizes(text: str) -> None:
    tracemalloc.start()
    messages = errors_of(text)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(messages) == 1
    assert peak_bytes < 1 << 20, f"{peak_bytes:,} bytes"


JUNK = st.recursive(
    # No subnormal numbers: a test that trained in this process has them flushed to zero.
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False)
    | st.text(max_size=8)
    | st.sampled_from([10**18, -(10**30), 10**200, 1e300, "\0", "nan", "bundled", "auto", "bytes"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4) | st.sampled_from(["path", "weight"]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
FIELDS = [(name, field.name) for name, kind in SECTIONS.items() for field in fields(kind)]


@settings(deadline=None)
@example(field=("schedule", "anneal"), junk=True)
@given(field=st.sampled_from(FIELDS), junk=JUNK)
def test_junk_in_a_field_is_accepted_or_reported_by_its_name(
    field: tuple[str, str], junk: Any
) -> None:
    section, key = field
    messages = errors_in({section: {key: junk}})
    assert not messages or any(f"{section}.{key}" in message for message in messages)


@settings(deadline=None)
@given(a=st.sampled_from(FIELDS), b=st.sampled_from(FIELDS), junk=JUNK)
@example(a=("model", "family"), b=("model", "rope_low_factor"), junk=4)
def test_no_error_hides_another(a: tuple[str, str], b: tuple[str, str], junk: Any) -> None:
    """With a wrong type in another field, all is reported that is reported about junk alone."""
    wrong: dict[str, dict[str, Any]] = {a[0]: {a[1]: {"no": "value"}}}
    for section, key in (a, b):
        wrong.setdefault(section, {}).setdefault(key, junk)
    messages = errors_in(wrong)
    assert any(f"{a[0]}.{a[1]}" in message for message in messages)
    if a == b:
        return
    for message in errors_in({b[0]: {b[1]: junk}}):
        # Defaults that an invalid family would set are unknown: nothing is compared with them.
        is_open = a == ("model", "family") and message.count("model.") > 1
        assert message in messages or f"{a[0]}.{a[1]}" in message or is_open


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "a file and a command line": (
        ["wrong.yaml", "--train.batch_tokens", "1000000000000000000", "--report.to", "mlflow"],
        [
            "6 errors:",
            "there is no train.stepz; did you mean 'train.steps'?",
            "model.n_heads is 0; it must be in [1, 2^20]",
            "optimizer.clip is -1.0; it must be at least 0",
            "train.batch_tokens is 1000000000000000000; it must be in [1, 10^10]",
            "report.to is 'mlflow'; it must be one of tensorboard, wandb",
            "missing.txt",
        ],
    ),
    "a text": (
        ["text.txt", "--model.n_layers", "1e9", "--model.d_model", "1e9"],
        ["2 errors:", "model.n_layers is 1000000000", "model.d_model is 1000000000"],
    ),
    "a source and no end": (
        ["endless.yaml"],
        ["2 errors:", "missing.txt", "train.steps or train.minutes must be given"],
    ),
    "two sources": (["two.yaml"], ["2 errors:", "missing.txt", "lost.txt"]),
    "not YAML": (["broken.yaml"], ["broken.yaml is not valid YAML: "]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_train_rejects_it_before_torch_is_imported_and_writes_nothing(
    name: str, tmp_path: Path
) -> None:
    args, expected = COMMANDS[name]
    files = {
        "wrong.yaml": "data: {source: missing.txt}\nmodel: {n_heads: 0}\noptimizer: {clip: -1}\n"
        "train: {stepz: 4}\n",
        "endless.yaml": "data: {source: missing.txt}",
        "two.yaml": "data: {source: [{path: missing.txt, weight: 1}, {path: lost.txt, weight: 1}]}",
        "broken.yaml": "train: [1",
        "text.txt": "It was the best of times. ",
    }
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    # What `python -m pretrain` runs, and then a look at what was imported.
    code = (
        "import json, sys; from pretrain.cli import main; code = main(['train', *sys.argv[1:]]);"
        "print(json.dumps(['torch' in sys.modules, code]))"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=tmp_path
    )
    seconds = time.perf_counter() - began
    assert json.loads(done.stdout) == [False, 2], done.stderr
    assert seconds < 5, f"{seconds:.2f} s"
    assert done.stderr.startswith("pretrain: ")
    assert "Traceback" not in done.stderr
    for fragment in expected:
        assert fragment in done.stderr, done.stderr
    if expected[0].endswith(" errors:"):
        assert len(re.findall(r"^  \S", done.stderr, re.MULTILINE)) == int(expected[0].split()[0])
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(files)
