"""What is compiled, and what is not; `test_verify` and `test_loss` compare compiled with eager
results."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.cli import main
from pretrain.config import RunConfig
from pretrain.distributed import open_world
from pretrain.model.config import ModelConfig, model_defaults
from pretrain.model.loss import LMLoss
from pretrain.train import resolve as page
from pretrain.train.config import Compile, TrainConfig
from tiny import TINY


@pytest.mark.parametrize("by_block", [False, True])
def test_a_run_compiles_the_training_step_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_block: bool
) -> None:
    """Evaluation and samples have other shapes, and each would be compiled for as long. With
    sharded weights each block is compiled."""
    graphs = []
    compile_parts = LMLoss.compile_parts
    monkeypatch.setattr(
        LMLoss,
        "compile_parts",
        lambda lm_loss, **_: compile_parts(lm_loss, by_block=by_block),
    )

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_module, modules = torch.nn.Module.compile, []

    def compile_counted(module: torch.nn.Module, **options: Any) -> None:
        modules.append(type(module).__name__)
        compile_module(module, backend=count, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_counted)
    args = [str(corpus), *TINY, "--train.compile", "on", "--train.steps", "4"]
    args += ["--train.evaluate_every", "2", "--run", str(tmp_path / "run")]
    assert main(["train", *args]) == 0
    assert modules == (["Block", "Block"] if by_block else ["Decoder"])
    assert len(graphs) == 1  # equal blocks share one graph


def test_without_a_cpp_compiler_the_message_says_what_to_do(corpus: Path, tmp_path: Path) -> None:
    args = [str(corpus), *TINY, "--train.steps", "2", "--run", str(tmp_path / "run")]
    result = subprocess.run(
        [sys.executable, "-m", "pretrain", "train", *args, "--train.compile", "on"],
        env={**os.environ, "CXX": "missing", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    (message,) = result.stderr.strip().splitlines()
    assert message == (
        "pretrain: torch.compile needs a C++ compiler, in a folder without spaces; install one, or "
        "use --train.compile off"
    )


def test_an_uncompiled_run_does_not_import_the_compiler(corpus: Path, tmp_path: Path) -> None:
    """The import takes 1.5 seconds. torch's optimizers and its initialisation of weights do it."""
    args = ["train", str(corpus), *TINY, "--train.steps", "2", "--run", str(tmp_path / "run")]
    program = "import sys; from pretrain.cli import main; assert main(sys.argv[1:]) == 0; "
    program += "print(sorted({'torch', 'torch._dynamo', 'sympy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "['torch']", result.stderr


def pace_of(monkeypatch: pytest.MonkeyPatch, compiled: Compile, seconds: list[float]) -> Any:
    """Return the measured seconds per step, and the number of trial steps, for steps that take
    `seconds`."""
    n_steps = 0

    def steps(*_: Any, steps: int, **__: Any) -> Iterator[float]:
        nonlocal n_steps
        for step in range(steps):
            n_steps += 1
            yield seconds[min(step, len(seconds) - 1)]

    monkeypatch.setattr("pretrain.train.build.trial_steps", steps)
    train = TrainConfig(minutes=1.0, batch_tokens=256, compile=compiled)
    config = RunConfig(model=ModelConfig(**model_defaults({"family": "gpt2"})), train=train)
    data: Any = None
    pace = page.measure_pace(config, data, open_world("cpu", threads=1))
    return pace.step_seconds, n_steps


@pytest.mark.parametrize(
    ("compiled", "first", "expected"),
    [
        # A first step of a minute is ignored if it contains compilation, and counts otherwise.
        ("on", 60.0, 0.1),
        ("off", 60.0, 60.0),
        ("off", 0.5, 0.1),
    ],
)
def test_pace_does_not_include_compilation(
    compiled: Compile, first: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, _ = pace_of(monkeypatch, compiled, [first, 0.1])
    assert seconds == pytest.approx(expected)


@pytest.mark.parametrize(("step_seconds", "n_steps"), [(0.59, 3), (0.61, 5)])
def test_pace_is_measured_with_as_few_steps_as_needed(
    step_seconds: float, n_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 100 steps of text and a minute, steps slower than 0.6 s matter."""
    monkeypatch.setattr(page, "max_steps", lambda *_: 100)
    monkeypatch.setattr(page, "_evaluating_steps", lambda *_: 0.0)
    assert pace_of(monkeypatch, "off", [step_seconds])[1] == n_steps
