"""What torch's compiler is asked for, and what it is not; that it computes the same is in
`test_verify` and `test_model`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.cli import main
from pretrain.config import RunConfig
from pretrain.distributed import open_world
from pretrain.model import LMLoss, ModelConfig
from pretrain.model.config import model_defaults
from pretrain.train import resolve as page
from pretrain.train.config import Compile, TrainConfig
from tiny import TINY


@pytest.mark.parametrize("by_block", [False, True])
def test_a_run_compiles_its_step_and_nothing_else(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_block: bool
) -> None:
    """Held-out text, a passage and samples have other shapes, each of which would take the compiler
    as long. Block by block is how it goes where weights are laid over processes."""
    graphs = []
    compile_parts = LMLoss.compile_parts
    monkeypatch.setattr(
        LMLoss,
        "compile_parts",
        lambda lm_loss, **how: compile_parts(lm_loss, by_block=by_block),
    )

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_module, modules = torch.nn.Module.compile, []

    def compile_counted(module: torch.nn.Module, **how: Any) -> None:
        modules.append(type(module).__name__)
        compile_module(module, backend=count, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_counted)
    words = [str(corpus), *TINY, "--train.compile", "on", "--train.steps", "4"]
    words += ["--train.evaluate_every", "2", "--run", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    assert modules == (["Block", "Block"] if by_block else ["Decoder"])
    assert len(graphs) == 1  # blocks are alike, and share theirs


def test_where_nothing_can_be_compiled_a_sentence_says_so(corpus: Path, tmp_path: Path) -> None:
    words = [str(corpus), *TINY, "--train.steps", "2", "--run", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "train", *words, "--train.compile", "on"],
        env={**os.environ, "CXX": "missing", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (said,) = done.stderr.strip().splitlines()
    assert said.startswith("pretrain: torch.compile lacks a C++ compiler")
    assert said.endswith("--train.compile off")


def test_what_is_not_compiled_does_not_import_the_compiler(corpus: Path, tmp_path: Path) -> None:
    """It takes a second and a half of every start, and torch's optimizers do so, as does its own
    drawing of first weights."""
    words = ["train", str(corpus), *TINY, "--train.steps", "2", "--run", str(tmp_path / "run")]
    asked = "import sys; from pretrain.cli import main; assert main(sys.argv[1:]) == 0; "
    asked += "print(sorted({'torch', 'torch._dynamo', 'sympy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", asked, *words], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['torch']", done.stderr


def pace_of(monkeypatch: pytest.MonkeyPatch, compiled: Compile, seconds: list[float]) -> Any:
    """What is measured of steps that take so long, and how many of them are made."""
    clock, made = 0.0, 0

    def steps(*given: Any, steps: int, **named: Any) -> Iterator[Any]:
        nonlocal clock, made
        for step in range(steps):
            clock, made = clock + seconds[min(step, len(seconds) - 1)], made + 1
            yield SimpleNamespace(step=step)

    monkeypatch.setattr("pretrain.train.build.trial_steps", steps)
    monkeypatch.setattr(page, "time", SimpleNamespace(perf_counter=lambda: clock))
    train = TrainConfig(minutes=1.0, batch_tokens=256, compile=compiled)
    config = RunConfig(model=ModelConfig(**model_defaults({"family": "gpt2"})), train=train)
    data: Any = None
    pace = page.measure_pace(config, data, open_world("cpu", threads=1))
    return pace.step_seconds, made


@pytest.mark.parametrize(
    ("compiled", "first", "expected"),
    [
        # A compiler's minute is not a step's; a step that takes so long by itself is.
        ("on", 60.0, 0.1),
        ("off", 60.0, 60.0),
        ("off", 0.5, 0.1),
    ],
)
def test_a_step_is_timed_without_its_compiler(
    compiled: Compile, first: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, _ = pace_of(monkeypatch, compiled, [first, 0.1])
    assert seconds == pytest.approx(expected)


@pytest.mark.parametrize(("each", "made"), [(0.59, 3), (0.61, 5)])
def test_no_more_is_timed_than_decides(
    each: float, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute, and a text that 100 steps have read: at 0.6 s a step it is enough."""
    monkeypatch.setattr(page, "max_steps", lambda *_: 100)
    monkeypatch.setattr(page, "_evaluating_steps", lambda *_: 0.0)
    assert pace_of(monkeypatch, "off", [each])[1] == made
