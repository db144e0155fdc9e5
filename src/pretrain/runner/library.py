"""The functions that `import pretrain` offers: train, prepare, load_model, evaluate, generate."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.data.preparation import prepare
from pretrain.runner.open import LoadedModel, load_model
from pretrain.runner.request import layer_of
from pretrain.runner.start import Request, RunResult, start

if TYPE_CHECKING:
    from pretrain.evaluate.loss import Score

__all__ = ["LoadedModel", "RunResult", "evaluate", "generate", "load_model", "prepare", "train"]


def train(
    target: str | Path | None = None,
    *,
    run: str | Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Train a model as `pretrain train` does, and return its folder and summary.

    Args:
        target: A text file or folder, a recipe, or a YAML file. Default: the recipe `english`.
        run: The run directory; must be new or empty. Default: runs/<name>-<n>.
        steps: Number of updates.
        minutes: Wall-clock time instead; of `steps` and `minutes`, `steps` decides.
        settings: Further settings by their full names, such as {"model.d_model": 64}.
        resume: Continue `run`, or the newest run, which `target` must not be given for.
        quiet: Print nothing.

    Raises:
        ConfigError: It lists every setting that is wrong.
        ValueError: For text that cannot be read, or a run directory that is not empty.
    """
    named = {"train.steps": steps, "train.minutes": minutes}
    given = {name: value for name, value in named.items() if value is not None}
    request = Request(
        kind="resume" if resume else "new",
        target=None if target is None else str(target),
        overrides=layer_of({**given, **(settings or {})}),
        folder=None if run is None else Path(run),
    )
    if not quiet:
        return start(request, sys.stdout)
    with open(os.devnull, "w") as stream:
        return start(request, stream)


def evaluate(model: LoadedModel, text: str | Sequence[str], *, stride: int | None = None) -> Score:
    """Return the nats, tokens and bytes of a text, or of several documents together.

    `perplexity` and `bits_per_byte` are properties of the result. Windows have the length of the
    model's context and start every `stride` tokens (default: they do not overlap). Files and tasks:
    `pretrain.evaluate.evaluate`.
    """
    return model.score([text] if isinstance(text, str) else text, stride=stride)


def generate(model: LoadedModel, prompt: str = "", **options: Any) -> list[str]:
    """Return continuations of a prompt; options are those of `LoadedModel.generate`."""
    return model.generate(prompt, **options)
