"""Empty fields of a config are filled from the sizes of model, text and device."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import compose, parse_overrides
from pretrain.corpus.reading import read_documents
from pretrain.data.preparation import prepare
from pretrain.distributed import World, open_world
from pretrain.model.config import ModelConfig
from pretrain.parallel import tensor
from pretrain.parallel.config import ParallelConfig
from pretrain.runner.request import read_target
from pretrain.train.config import TrainConfig
from pretrain.train.resolve import (
    check_batch,
    check_model_fits,
    expected_memory,
    resolve,
    resolve_precision,
)
from runs import train
from tiny import TINY


def test_minutes_are_at_most_one_epoch_with_ngram_tables(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(corpus), *TINY, *"--train.minutes 9 --train.evaluate_every 1000000".split()]
    args += ["--train.members", "1", "--train.counts", "0"]
    args += ["--run", str(tmp_path / "run"), "--model.ngram_rows", "64"]
    assert train(*args, "--train.batch_tokens", "2048") == 0
    done = json.loads((tmp_path / "run" / "summary.json").read_text())
    once = math.ceil(done["tokens"] / done["epochs"] / 2048)
    assert 1 < once < 50
    assert done["steps"] == once
    output = " ".join(capsys.readouterr().out.split())
    assert "n-gram tables memorise what is read twice" in output


def test_counts_that_do_not_fit_63_bits_are_rejected_before_the_first_step(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    args = [str(corpus), "--run", str(run), *TINY, "--train.steps", "3", "--train.counts", "8"]
    assert train(*args) == 2
    assert "train.counts is 8; it must be at most 7" in " ".join(capsys.readouterr().err.split())
    assert not list(run.glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("family", "size", "vocab_size", "expected"),
    [
        # A context that grows with fast, and micro-batches whose layers fit the caches.
        ("fast", 2, 400, {"context_length": 256, "longest_ngram": 6, "tokens": 3840}),
        ("fast", 5, 1100, {"context_length": 512, "longest_ngram": 3, "tokens": 2048}),
        ("gpt2", None, 1100, {"context_length": 128, "longest_ngram": None, "tokens": 6144}),
    ],
)
def test_empty_fields_are_filled_from_sizes(
    tmp_path: Path, family: str, size: int | None, vocab_size: int, expected: dict[str, int | None]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(document.text for document in read_documents("bundled"))[:120_000])
    data = prepare(text, tmp_path / "prepared", vocab_size=vocab_size)
    config = compose([{"model": {"family": family, "size": size}, "train": {"steps": 3}}])
    whole = replace(config.train, batch_tokens=30_720)
    resolved = resolve(replace(config, train=whole), data, open_world("cpu", threads=1))
    assert resolved.model.context_length == expected["context_length"]
    assert resolved.model.longest_ngram == expected["longest_ngram"]
    assert resolved.train.micro_batch_rows is not None
    tokens = resolved.train.micro_batch_rows * resolved.model.window_tokens
    assert tokens == expected["tokens"]


@pytest.mark.parametrize("recipe", ["english", "characters", "multitask"])
@pytest.mark.parametrize("size", range(1, 13))
def test_batch_of_a_recipe_is_a_multiple_of_the_context_for_every_size(
    recipe: str, size: int
) -> None:
    config = compose([*read_target(recipe)[1], parse_overrides(["--model.size", str(size)])])
    sizes = {"n_tokens": 1_000_000, "n_train_tokens": 1_000_000}
    context, batch_tokens = check_batch(config.model, config.train, **sizes)
    assert batch_tokens == (config.train.batch_tokens or 4096)
    assert batch_tokens % context == 0
    assert context == 384 if recipe == "multitask" else size * 64 < context <= size * 128
    assert config.model.rows_of_a_table == (131_072 if recipe == "english" else 65_536)


@pytest.mark.parametrize(
    ("n_tokens", "with_tables", "without"),
    [
        (1_300, 128, 8192),  # a context of 128
        (22_000, 256, 8192),
        (200_000, 1024, 8192),
        (500_000, 2048, 8192),
        (2_753_904, 4096, 8192),
        (10**10, 4096, 8192),
    ],
)
def test_a_small_text_that_is_read_once_has_small_batches(
    n_tokens: int, with_tables: int, without: int
) -> None:
    for rows, expected in ((4096, with_tables), (0, without)):
        config = compose([{"model": {"family": "fast", "size": 2, "ngram_rows": rows}}])
        sizes = {"n_tokens": n_tokens, "n_train_tokens": n_tokens}
        assert check_batch(config.model, config.train, **sizes)[1] == expected


@pytest.mark.parametrize(
    ("settings", "has_units", "precision"),
    [
        ({"minutes": 1.0}, True, "bf16"),
        ({"minutes": 1.0}, False, "fp32"),
        # A run limited by steps is the same on every machine.
        ({"minutes": 1.0, "steps": 3}, True, "fp32"),
        ({"minutes": 1.0, "precision": "fp32"}, True, "fp32"),
    ],
)
def test_cpu_uses_bf16_only_for_runs_limited_by_minutes(
    settings: dict[str, Any], has_units: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "has_native_bf16", lambda world: has_units)
    world = open_world("cpu", threads=1)
    assert resolve_precision(TrainConfig(**settings), world) == precision


def test_a_part_that_tensor_parallelism_cannot_split_is_rejected_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    axes = ParallelConfig(tensor=2).resolve(2)
    model = ModelConfig(context_length=16)
    check_model_fits(model, axes, vocab_size=300)
    monkeypatch.delitem(tensor._STYLES, "feed_forward.gate")
    with pytest.raises(ValueError, match=r"parallel\.tensor must be 1: .* feed_forward\.gate"):
        check_model_fits(model, axes, vocab_size=300)


def test_settings_are_checked_without_torch() -> None:
    """Its import takes seconds, and a wrong context or batch is named before it."""
    code = "import sys, pretrain.train.resolve; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_is_stated_before_it_is_taken(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"{n} green bottles hanging on the wall {n * n}\n" for n in range(2000))
    )
    args = [str(text), "--train.steps", "2", "--run", str(tmp_path / "run"), "--train.counts", "5"]
    args += ["--model.ngram_rows", "65536", "--train.threads", "1"]  # 252 MB of tables
    # Not a child of this process, whose peak in other tests would count as its own.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", "pretrain", "train", *args]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = re.search(r"memory +about ([\d,]+) MB", output)
    assert match
    stated = 1e6 * int(match[1].replace(",", ""))
    taken = json.loads((tmp_path / "run" / "summary.json").read_text())["peak_memory_bytes"]
    # Two steps touch few rows of a table, so this run takes less than a longer one.
    assert 0.95 * taken < stated < 1.3 * taken


def test_more_rows_or_windows_need_more_memory() -> None:
    def needed(n: int = 1000, **settings: Any) -> int:
        config = compose([{"train": {"micro_batch_rows": 4}}, settings])
        model = replace(config.model, context_length=config.model.context_length or 128)
        return expected_memory(replace(config, model=model), 512, n)

    least = needed()
    assert needed(10**6) == least, "text is read from the disk"
    assert needed(train={"counts": 5}) < needed(10**6, train={"counts": 5})
    for section in ({"ngram_rows": 10**6}, {"n_layers": 20}, {"context_length": 4096}):
        assert needed(model=section) > 1.02 * least
