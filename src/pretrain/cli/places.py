"""Where things lie: recipes, run directories, and the cache of prepared text."""

from __future__ import annotations

import glob
import importlib.resources
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.config import Layer, RunConfig, read_file
from pretrain.data.manifest import is_prepared
from pretrain.data.mixed import MixedData
from pretrain.data.preparation import prepare, prepared_key
from pretrain.data.shards import PreparedData, open_prepared

RUNS = Path("runs")
# What was asked for, in a run's folder until all that it leaves open is decided.
ASKED = "asked.yaml"
DEFAULT_RECIPE = "english"


def recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    folder = Path(str(importlib.resources.files("pretrain") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_target(target: str | None) -> tuple[str, list[Layer]]:
    """What `pretrain train TARGET` means: a run's name, and the config layers under the command
    line's.

    A recipe's name, else a YAML file, else a source of text, which gets the default recipe's
    settings.
    """
    known = recipes()
    if target is None or target in known:
        name = target or DEFAULT_RECIPE
        return name, [read_file(known[name])]
    path = Path(target)
    if path.suffix.lower() in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"there is no config file {target}")
        return path.stem, [read_file(path)]
    is_pattern = glob.has_magic(target)
    if not path.exists() and not is_pattern:
        raise ValueError(
            f"{target!r} is neither a recipe ({', '.join(known)}) nor a file or folder that exists"
        )
    named = path.resolve().parent if is_pattern and not path.exists() else path.resolve()
    name = named.name.split(".")[0] or "text"
    return name, [read_file(known[DEFAULT_RECIPE]), {"data": {"source": str(path.resolve())}}]


def new_run_folder(name: str, asked: str | None) -> Path:
    """The folder of a new run, checked to be empty and writable; it is made when the run begins."""
    if asked is not None:
        folder = Path(asked)
        if folder.exists() and not _is_vacant(folder):
            raise ValueError(
                f"{folder} is not an empty folder; choose another --run, or go on with --resume"
            )
    else:
        number = 1
        while (RUNS / f"{name}-{number}").exists():
            number += 1
        folder = RUNS / f"{name}-{number}"
    _check_writable(folder)
    return folder


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a run that can be resumed, decided or not."""
    return any((folder / name).is_file() for name in ("config.yaml", ASKED))


def _is_vacant(folder: Path) -> bool:
    """Whether nothing is in a folder but what a run leaves that was killed before it was
    decided."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or (ASKED in names and "config.yaml" not in names)


def _check_writable(folder: Path) -> None:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"cannot write a run to {folder}: {error.strerror}") from None


def newest_run() -> Path:
    """The run under runs/ that was begun last."""
    begun = [p for name in ("config.yaml", ASKED) for p in RUNS.glob(f"*/{name}")]
    if not begun:
        raise ValueError(f"there is no run in {RUNS}/ to resume; name one with --run DIR")
    return max(begun, key=lambda p: p.stat().st_mtime_ns).parent


def cache_folder() -> Path:
    """Where prepared text is kept between runs: PRETRAIN_CACHE, or the user's cache folder."""
    given = os.environ.get("PRETRAIN_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pretrain"


def prepared(
    config: RunConfig, *, progress: Callable[[str, float], None] | None = None
) -> PreparedData:
    """The run's text as token ids: prepared folders that were given, one from the cache, or one
    made now."""
    data = config.data
    given = [path for path in data.paths if is_prepared(path)]
    if given and len(given) < len(data.paths):
        raise ValueError(
            f"data.source names both {given[0]!r}, which is prepared, and texts; prepare those too "
            "(pretrain prepare TEXT --out DIR, with the tokenizer of the other), or name texts only"
        )
    found = [open_prepared(path) for path in given]
    if not found:
        found = [_from_cache(config, progress=progress)]
    return found[0] if isinstance(data.source, str) else MixedData(data, found)


def text_of_run(config: RunConfig, fingerprint: Mapping[str, Any]) -> PreparedData:
    """The text that a run was trained on, told by the hashes in its fingerprint; where its sources
    have moved or gone, from the cache. ValueError where it is another."""

    def is_the_same(data: PreparedData) -> bool:
        found = {
            "tokenizer": data.manifest.tokenizer_sha256,
            "training text": data.split("train").sha256,
            "held-out text": data.split("val").sha256,
        }
        return found.items() <= fingerprint.items()

    try:
        data = prepared(config)
    except ValueError:
        found = map(open_prepared, filter(is_prepared, (cache_folder() / "prepared").glob("*")))
        is_mixed = not isinstance(config.data.source, str)
        for each in found:
            data = MixedData(config.data, [each]) if is_mixed else each
            if is_the_same(data):
                return data
        raise
    if not is_the_same(data):
        raise ValueError(
            f"the text at {', '.join(config.data.paths)} has changed since the run; your own files "
            "are scored with --text"
        )
    return data


def _from_cache(
    config: RunConfig, *, progress: Callable[[str, float], None] | None
) -> PreparedData:
    data, tokenizer = config.data, config.tokenizer
    settings: dict[str, Any] = {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "text_field": data.text_field,
        "val_fraction": data.val_fraction,
        "corpus": config.corpus,
    }
    folder = cache_folder() / "prepared" / prepared_key(data.paths, **settings)
    if not is_prepared(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            return prepare(data.paths, folder, progress=progress, **settings)
        except FileExistsError:
            pass  # another process was quicker and has made the same
    return open_prepared(folder)
