"""The sections `data`, `corpus`, `tokenizer`, `evaluate`, `report`: every range and rule."""

from __future__ import annotations

import pytest

from config_errors import errors_of

A_SOURCE = "a path of a file or folder, 'bundled', or a list of {path, weight}"
ENTRY_KEYS = "a mapping with keys of path, weight, epochs, stage"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("data: {val_fraction: 1}", ["data.val_fraction is 1.0; it must be in (0, 0.5]"]),
        ("data: {val_fraction: 0}", ["data.val_fraction is 0.0; it must be in (0, 0.5]"]),
        ('data: {text_field: ""}', ["data.text_field is ''; it must be the name of a field"]),
        ("data: {exhausted: stop}", ["data.exhausted is 'stop'; it must be one of repeat, error"]),
        ('data: {source: ""}', [f"data.source is ''; it must be {A_SOURCE}"]),
        ("data: {source: []}", [f"data.source is (); it must be {A_SOURCE}"]),
        (
            "corpus: {deduplicate: fuzzy, filters: [gopher, best, c5], languages: [xyzw, en, DE]}",
            [
                "corpus.deduplicate is 'fuzzy'; it must be one of none, exact, near",
                "corpus.filters is 'best'; it must be one of gopher, c4, fineweb",
                "corpus.filters is 'c5'; it must be one of gopher, c4, fineweb",
                "corpus.languages is 'xyzw'; it must be a code of two or three letters, such as en",
                "corpus.languages is 'DE'; it must be a code of two or three letters, such as en",
            ],
        ),
        (
            "corpus: {remove_overlap: true}",
            ["corpus.remove_overlap needs corpus.evaluation_texts to compare with"],
        ),
        (
            'tokenizer: {name: ""}',
            ["tokenizer.name is ''; it must be bpe, gpt, characters, bytes, gpt2, or a path"],
        ),
        (
            "tokenizer: {name: characters, vocab_size: 1}",
            ["tokenizer.vocab_size is 1; it must be in [2, 2^24]"],
        ),
        (
            "tokenizer: {vocab_size: 1e9}",
            ["tokenizer.vocab_size is 1000000000; it must be in [2, 2^24]"],
        ),
        (
            "tokenizer: {name: bytes, vocab_size: 300}",
            [
                "tokenizer.vocab_size is 300; it must be 257 for the tokenizer 'bytes'; leave it "
                "out, or use --tokenizer.name bpe"
            ],
        ),
        (
            "tokenizer: {vocab_size: 256}",
            [
                "tokenizer.vocab_size is 256; it must be at least 257 for bpe: every byte and the "
                "end-of-text token"
            ],
        ),
        ("tokenizer: {name: ~, vocab_size: 9}", ["tokenizer.name is empty; it must be a text"]),
        (
            "evaluate: {examples: 0, every: 0}",
            [
                "evaluate.examples is 0; it must be in [1, 10^10]",
                "evaluate.every is 0; it must be in [1, 10^10]",
            ],
        ),
        (
            "report: {to: [mlflow, wandb, aim]}",
            [
                "report.to is 'mlflow'; it must be one of tensorboard, wandb",
                "report.to is 'aim'; it must be one of tensorboard, wandb",
            ],
        ),
    ],
)
def test_invalid_values_are_rejected(text: str, messages: list[str]) -> None:
    assert errors_of(text) == messages


def test_an_unknown_task_is_rejected() -> None:
    (message,) = errors_of("evaluate: {tasks: [hellaswagg]}")
    assert message.startswith("evaluate.tasks: ")
    assert "hellaswag" in message


@pytest.mark.parametrize(
    ("sources", "messages"),
    [
        ("[{path: a}]", ["data.source: 'a' needs either a weight or epochs"]),
        (
            "[{path: a, weight: 1, epochs: 1}]",
            ["data.source: 'a' needs either a weight or epochs"],
        ),
        ("[{weight: 1}]", ["data.source[0] needs a value for 'path'"]),
        ("[~]", [f"data.source[0] is empty; it must be {ENTRY_KEYS}"]),
        (
            "[a, {path: b, weight: 1}]",
            [f"data.source is 'a'; it must be {ENTRY_KEYS}"],
        ),
        ("[a, '']", ["data.source is ''; it must be a path of a file or folder"]),
        (
            "[{path: a, weight: -1, stage: 2}, {path: b, weigh: 1}, {path: [c]}, "
            "{path: '', epochs: 0, stage: -1}]",
            [
                "data.source[0].weight is -1.0; it must be above 0",
                "data.source[0].stage is 2.0; it must be in [0, 1)",
                "there is no data.source[1].weigh; did you mean 'data.source[1].weight'?",
                "data.source[2].path is ['c']; it must be a text",
                "data.source[3].path is ''; it must be a path of a file or folder",
                "data.source[3].epochs is 0.0; it must be above 0",
                "data.source[3].stage is -1.0; it must be in [0, 1)",
            ],
        ),
        (
            "[{path: a, weight: 1}, {path: a, epochs: 1}]",
            [
                "data.source: the stage at 0.0 has both weights and epochs; it must have one of "
                "them",
                "data.source: the stage at 0.0 has the same path twice",
            ],
        ),
        (
            "[{path: a, weight: 1, stage: 0.5}]",
            ["data.source: the first stage begins at 0.5; it must be at 0"],
        ),
    ],
)
def test_invalid_lists_of_sources_are_rejected(sources: str, messages: list[str]) -> None:
    assert errors_of(f"data: {{source: {sources}}}") == messages
