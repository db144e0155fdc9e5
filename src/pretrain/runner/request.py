"""What a user typed -> a checked config, and the folder of the run.

TARGET is a recipe, a YAML file, or one or more texts; settings of the command line win over its
own. A YAML file starts from the defaults, or from the recipe or file that it `extends`. Sources
become absolute paths, so that a resume from another folder finds them. ValueError for files,
packages and tasks that are missing on this machine, and for a run folder that is in use.
"""

from __future__ import annotations

import glob
import importlib.resources
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import Layer, Rules, RunConfig, compose, read_file, to_dict
from pretrain.corpus.files import list_files
from pretrain.data.format import PreparedData, is_prepared
from pretrain.evaluate.task_files import read_in_loop_tasks, task_folder
from pretrain.fileio import read_json
from pretrain.report.config import require_packages
from pretrain.run.directory import CHECKPOINT_MANIFEST, CONFIG, MIX, REQUESTED, TOKENIZER
from pretrain.runner.open import find_checkpoint, open_checkpoint_of, read_unchanged
from pretrain.validation import did_you_mean, nearest, shown

if TYPE_CHECKING:
    from pretrain.checkpoint.load import Checkpoint

RUNS = Path("runs")
DEFAULT_RECIPE = "english"
# Settings in which a run may differ from the model that train.init_from names: no shape depends on
# them.
_SHAPELESS = frozenset({"preset", "dropout", "attention_dropout", "initialization"})


# --- the target --------------------------------------------------------------------------------


def recipes() -> dict[str, Path]:
    """Return the recipes that ship with the package, by name."""
    folder = Path(str(importlib.resources.files("pretrain") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def is_yaml(*targets: str) -> bool:
    """Return whether a target is a config file."""
    return len(targets) == 1 and targets[0].lower().endswith((".yaml", ".yml"))


def read_target(*targets: str) -> tuple[str, list[Layer]]:
    """Return a name for the run, and the config layers below the command line's: those of a
    recipe, of a YAML file, or of the default recipe with one or more texts."""
    known = recipes()
    first, *others = targets or [DEFAULT_RECIPE]
    if not others and (first in known or is_yaml(first)):
        return Path(first).stem, _read_layers(first)
    paths = []
    for each in targets:
        if each in known or is_yaml(each):
            raise ValueError(f"{each} must stand alone: several targets must all be texts")
        path = Path(each)
        is_pattern = glob.has_magic(each) and not path.exists()
        if not path.exists() and not is_pattern:
            close = nearest(each, known)
            hint = f"; {did_you_mean(close)}" if close else ""
            raise ValueError(
                f"{each!r} is neither a recipe ({', '.join(known)}) nor a file or folder that "
                f"exists{hint}"
            )
        paths.append(path.resolve())
    named = paths[0].parent if is_pattern or others else paths[0]
    source = [str(path) for path in paths] if others else str(paths[0])
    layers: list[Layer] = [read_file(known[DEFAULT_RECIPE]), {"data": {"source": source}}]
    return named.name.split(".")[0] or "text", layers


def _read_layers(name: str, above: Sequence[str] = ()) -> list[Layer]:
    """Return the layer of a recipe or a config file, after those of what it `extends`; the first
    one is that of a recipe, or empty."""
    known = recipes()
    path = known.get(name, Path(name))
    if not path.is_file():
        raise ValueError(f"there is no config file {name}")
    if name in above:
        raise ValueError(f"{name} extends itself")
    layer: dict[str, Any] = dict(read_file(path))
    if name in known:  # `multitask` reads what `demonstrate` has written, of what there is any
        source = layer["data"]["source"]
        here = [each for each in source if isinstance(each, dict) and Path(each["path"]).exists()]
        return [{**layer, "data": {"source": here or source}}]
    base = layer.pop("extends", None)
    if base is None:
        return [{}, layer]
    if not isinstance(base, str) or not (base in known or is_yaml(base)):
        raise ValueError(
            f"{name}: extends is {shown(base)}; it must be a recipe ({', '.join(known)}) or a "
            ".yaml file"
        )
    below = base if base in known else str(path.parent / base)
    return [*_read_layers(below, (*above, name)), layer]


def compose_target(
    targets: Sequence[str], layers: list[Layer], overrides: Layer, *, rules: Rules | None = None
) -> RunConfig:
    """Compose the layers of a target with the command's overrides; `rules`: see `compose`.

    With train.init_from, architecture and tokenizer are those of that model, whatever a recipe
    names; with train.teacher alone, the tokenizer is. ValueError where the user's own settings, of
    which a YAML file is one, do not fit the weights.
    """
    n_recipe = len(layers) - is_yaml(*targets)
    recipe, user = layers[:n_recipe], [*layers[n_recipe:], overrides]
    config = compose([*recipe, *user], rules=rules)
    found: dict[str, tuple[Path, Path]] = {}
    for setting in ("init_from", "teacher"):
        if (name := getattr(config.train, setting)) is None:
            continue
        source = Path(name)
        if not (source / CONFIG).is_file() and not (source / CHECKPOINT_MANIFEST).is_file():
            raise ValueError(
                f"train.{setting} must be a run or a checkpoint (got {source}); import a model of "
                f"another library first: pretrain import {source} --out DIR"
            )
        if setting == "init_from":
            check_is_one_model(source, "trained")
        found[setting] = find_checkpoint(source, alone=setting == "init_from")
    if not found:
        return config
    run = next(iter(found.values()))[0]
    old_model = compose([read_file(run / CONFIG)]).model if "init_from" in found else config.model
    inherited: Layer = {
        "tokenizer": {"name": str((run / TOKENIZER).resolve()), "vocab_size": None},
        **({"model": {**asdict(old_model), "preset": None}} if "init_from" in found else {}),
    }
    rest: list[Layer] = [
        {section: keys for section, keys in layer.items() if section not in inherited}
        for layer in recipe
    ]
    paths = {setting: str(checkpoint.resolve()) for setting, (_, checkpoint) in found.items()}
    may_differ = _SHAPELESS | ({"context_length"} if old_model.position != "learned" else set())

    def misfits(config: RunConfig) -> Iterator[tuple[str, str]]:
        if "init_from" not in found:
            return
        if any("tokenizer" in layer for layer in user):
            yield (
                "train.init_from",
                "tokenizer settings must not be given with train.init_from: its tokenizer is used",
            )
        before, after = asdict(old_model), asdict(config.model)
        names = [key for key in before if before[key] != after[key] and key not in may_differ]
        if names:
            changes = "; ".join(f"model.{name} {before[name]} -> {after[name]}" for name in names)
            yield (
                " ".join(f"model.{name}" for name in names),
                f"the weights of train.init_from would not fit: {changes}",
            )

    return compose([*rest, inherited, *user, {"train": paths}], rules=misfits)


def notes_of(layers: list[Layer], overrides: Layer, config: RunConfig) -> Iterator[str]:
    """Yield what a user may not expect: where a file starts from, and a length without effect."""
    lowest = {name for layer in layers[:2] for name in layer}
    if not {"model", "optimizer"} <= lowest:  # a config file that extends no recipe
        yield (
            f"what this file leaves out has its default (family {config.model.family}, optimizer "
            f"{config.optimizer.name}); `extends: {DEFAULT_RECIPE}` in it starts from that recipe"
        )
    for train in (layer.get("train", {}) for layer in (layers[-1], overrides)):
        if None not in (train.get("steps"), train.get("minutes")):
            yield f"train.minutes has no effect, because train.steps is {train['steps']}"


def check_is_one_model(path: Path, action: str) -> None:
    """ValueError if MODEL is a mix of probabilities, with which `action` cannot be done."""
    folder = path.parent.parent if (path / CHECKPOINT_MANIFEST).is_file() else path
    if (folder / MIX).is_file() and read_json(folder / MIX).get("average") != "weights":
        raise ValueError(
            f"{path} is a mix of models, which cannot be {action}; train one model that learns "
            f"from it: pretrain train TEXT --train.teacher {folder}"
        )


def initial_checkpoint(config: RunConfig) -> Checkpoint | None:
    """Open the checkpoint that train.init_from names, or return None where it is not set.
    ValueError if its model was changed since it was trained."""
    if config.train.init_from is None:
        return None
    run, checkpoint = open_checkpoint_of(Path(config.train.init_from))
    read_unchanged(run, checkpoint)
    return checkpoint


def teacher_checkpoint(config: RunConfig, data: PreparedData) -> Checkpoint | None:
    """Open the checkpoint of train.teacher, or return None where it is not set. ValueError if it
    was changed, reads shorter windows, or has another tokenizer than the text."""
    if config.train.teacher is None:
        return None
    run, checkpoint = open_checkpoint_of(Path(config.train.teacher))
    teacher, tokenizer = read_unchanged(run, checkpoint)
    context, hash_ = config.model.context_length or 1, data.manifest.tokenizer_sha256
    if tokenizer.sha256 != hash_ or teacher.model.window_tokens < context:
        raise ValueError(
            f"train.teacher must have the tokenizer of the text, of SHA-256 {hash_[:12]}, and a "
            f"context of at least {context} (got {tokenizer.sha256[:12]} and "
            f"{teacher.model.window_tokens} of {run})"
        )
    return checkpoint


# --- settings by name --------------------------------------------------------------------------


def by_name(layer: Layer) -> dict[str, Any]:
    """Return the values of a layer by the full names of their settings."""
    return {
        f"{section}.{key}": value
        for section, values in layer.items()
        for key, value in values.items()
    }


def layer_of(values: Mapping[str, Any]) -> Layer:
    """Return the layer of settings by full name."""
    layer: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        layer.setdefault(section, {})[key] = value
    return layer


def with_settings(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the config with some settings, by full name; names that it does not have are
    ignored."""
    old = by_name(to_dict(config))
    return compose([layer_of({name: values.get(name, value) for name, value in old.items()})])


# --- this machine ------------------------------------------------------------------------------


def errors_of_machine(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield an error (its fields, message) for each text, package or task that is missing here,
    and for a run without an end."""
    paths = (*config.data.paths, *filter(None, [config.data.base]))
    tasks = "evaluate.tasks evaluate.task_files evaluate.texts evaluate.examples"
    checks: list[tuple[str, Callable[..., object], object]] = [
        *(("data.source", list_files, path) for path in paths if not is_prepared(path)),
        *(("report.to", require_packages, [tracker]) for tracker in config.report.to),
        (tasks, read_in_loop_tasks, config.evaluate),
    ]
    for fields, check, value in checks:
        try:
            check(value)
        except ValueError as error:
            yield fields, str(error)
    has_end = config.train.steps is not None or config.train.minutes is not None
    # A mixture may give the epochs of its sources, which is an end too.
    if not has_end and not config.data.mixture:
        yield (
            "train.steps train.minutes data.source",
            "train.steps or train.minutes must be given: one of them sets the length",
        )


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with absolute paths of texts and tasks, for a resume that starts in another
    folder."""
    values = by_name(to_dict(config))
    lists = ("corpus.evaluation_texts", "evaluate.task_files", "evaluate.texts")
    absolute: dict[str, Any] = {name: [_absolute(path) for path in values[name]] for name in lists}
    source = values["data.source"]
    if config.data.mixture:
        absolute["data.source"] = [{**each, "path": _absolute(each["path"])} for each in source]
    else:
        is_one = isinstance(source, str)
        absolute["data.source"] = _absolute(source) if is_one else [*map(_absolute, source)]
    if config.data.base is not None:
        absolute["data.base"] = _absolute(config.data.base)
    # With tasks, the folder may come from the environment of this process.
    if config.evaluate.tasks and (folder := task_folder(config.evaluate.task_data)) is not None:
        absolute["evaluate.task_data"] = _absolute(str(folder))
    return with_settings(config, absolute)


def _absolute(path: str) -> str:
    return path if path == "bundled" else str(Path(path).resolve())


# --- the run's folder --------------------------------------------------------------------------


def new_run_folder(name: str, requested: Path | None) -> Path:
    """Return the folder of a new run: `requested`, which must be empty or have only a run that was
    killed before its settings were resolved, or the next free runs/NAME-N. It must be writable, and
    is made when the run starts."""
    folder = requested or next(
        path for n in itertools.count(1) if not (path := RUNS / f"{name}-{n}").exists()
    )
    is_vacant = folder.is_dir() and (is_unresolved(folder) or not any(folder.iterdir()))
    if folder.exists() and not is_vacant:
        raise ValueError(
            f"{folder} must be an empty folder; choose another --run, or continue the run in it "
            "with --resume"
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"cannot write a run to {folder}: {error.strerror}") from None
    return folder


def is_unresolved(folder: Path) -> bool:
    """Return whether a folder has only the requested settings of a run that was killed before they
    were resolved."""
    return (folder / REQUESTED).is_file() and not (folder / CONFIG).is_file()


def is_started(folder: Path) -> bool:
    """Return whether a folder has a run that can be resumed, resolved or not."""
    return (folder / CONFIG).is_file() or (folder / REQUESTED).is_file()


def newest_run() -> Path:
    """Return the run under runs/ that was started last."""
    started = [path for name in (CONFIG, REQUESTED) for path in RUNS.glob(f"*/{name}")]
    if not started:
        raise ValueError(f"there is no run in {RUNS}/ to resume; name one with --run DIR")
    return max(started, key=lambda path: path.stat().st_mtime_ns).parent
