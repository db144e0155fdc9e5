"""Pre-train a decoder-only Transformer on any text, and show what it learned.

    run = pretrain.train("my.txt", minutes=10)
    model = pretrain.load_model(run.folder)
    model.generate("Once upon a time", max_tokens=100)

Every number is a pure function of (seed, step, global sample). The packages are in the order of
the data: corpus, tokenizer, data, model, optim, parallel, checkpoint, generate, evaluate, train,
export, report; `runner` starts runs and loads models, `cli` is the command line. Importing this
module imports none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.data.preparation import prepare
    from pretrain.runner.open import evaluate, generate, load_model
    from pretrain.runner.start import train

__all__ = ["__version__", "evaluate", "generate", "load_model", "prepare", "train"]

# The one place of the version: the build reads this line (pyproject.toml, tool.hatch.version).
__version__ = "0.1.0"

_MODULES = {
    "prepare": "pretrain.data.preparation",
    "load_model": "pretrain.runner.open",
    # Of these names there are packages too, which can be called: `_CallablePackage`.
    "evaluate": "pretrain.runner.open",
    "generate": "pretrain.runner.open",
    "train": "pretrain.runner.start",
}


def public_function(name: str) -> Any:
    """Return a function that `import pretrain` offers."""
    return getattr(import_module(_MODULES[name]), name)


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    is_package = name in ("train", "evaluate", "generate")
    return import_module(f"pretrain.{name}") if is_package else public_function(name)


class _CallablePackage(ModuleType):
    """The class of a package that has the name of a public function: `pretrain.train(...)` calls
    the function, `pretrain.train.loop` is a module."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        name = self.__name__.removeprefix("pretrain.")
        return public_function(name)(*args, **options)


def make_callable(package: str) -> None:
    """Give a package that is being imported the class above."""
    sys.modules[package].__class__ = _CallablePackage


def missing_package(feature: str, package: str, *, extra: str = "formats") -> ValueError:
    """Return the error for a missing optional package, with the command that installs it."""
    from pretrain.machine import install_command

    return ValueError(
        f"{feature} needs the package {package}: {install_command(package, extra=extra)}"
    )


@contextmanager
def needs_package(feature: str, package: str, *, extra: str = "formats") -> Iterator[None]:
    """Turn the ImportError of an optional package into the error of `missing_package`, and name
    the package in other errors of its import, as that of protobuf for versions that do not fit."""
    try:
        yield
    except ImportError as error:
        raise missing_package(feature, package, extra=extra) from error
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{feature} needs the package {package}, whose import fails: install it again, with "
            f"versions that fit ({type(error).__name__}: {error!s:.200})"
        ) from error
