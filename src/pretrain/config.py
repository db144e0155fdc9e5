"""The rooms' configs composed: YAML and the command line in, one checked RunConfig out, and back to
YAML.

Values come in layers (a family's and preset's defaults, a recipe or file, the command line) and
later ones win. An unknown key names its nearest neighbour, a wrong value says what would be legal,
and all of it happens before torch is imported.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pretrain.corpus.config import CorpusConfig
from pretrain.data.config import DataConfig
from pretrain.model.config import ModelConfig, model_defaults
from pretrain.optimizer.config import OptimizerConfig, ScheduleConfig
from pretrain.report.config import ReportConfig
from pretrain.tokenizer.config import TokenizerConfig
from pretrain.train.config import TrainConfig

Layer = Mapping[str, Mapping[str, Any]]
_LARGEST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that a run depends on, one section a room."""

    data: DataConfig = field(default_factory=DataConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


SECTIONS: dict[str, type[Any]] = {f.name: f.default_factory for f in fields(RunConfig)}  # type: ignore[misc]


# --- YAML, version 1.2's core schema
# -------------------------------------------------------------------------


_NUMBER = re.compile(
    r"""^(?:[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?
          |0o[0-7]+|0x[0-9a-fA-F]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_NULL = ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"))
_BOOL = ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"))
_FLOAT = ("tag:yaml.org,2002:float", _NUMBER)


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    text = node.value.lower()
    if text.lstrip("+-") in (".inf", ".nan"):
        return float(text.replace(".", ""))
    if text.startswith(("0x", "0o")):
        return int(text, 0)
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


class _CoreLoader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where `no` is false and `3e-4` is text; this reads the 1.2 core
    schema.

    Aliases and repeated keys are refused: neither is ever meant in a config, and both hide
    mistakes.
    """

    # By first character of a scalar; a plain word that none of them matches is text.
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML wants a class attribute
        **{first: [_NULL] for first in ("~", "n", "N", "")},
        **{first: [_BOOL] for first in "tTfF"},
        **{first: [_FLOAT] for first in "-+.0123456789"},
    }
    yaml_constructors = {  # noqa: RUF012
        **yaml.SafeLoader.yaml_constructors,
        _FLOAT[0]: _construct_number,
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*) are not used", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, *, name: str) -> Any:
    """The value of a YAML text; ValueError names `name`, line and column for anything that is not
    right."""
    loader = None
    try:
        loader = _CoreLoader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not the YAML that is meant here: {error}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_file(path: Path) -> Layer:
    """A config file as a layer of sections; raises ValueError where it is not one."""
    if path.stat().st_size > _LARGEST_FILE_BYTES:
        raise ValueError(f"{path} has more than {_LARGEST_FILE_BYTES:,} bytes: not a config")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    content = read_yaml(text, name=str(path)) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r}; sections such as `train:` are meant")
    for name, section in content.items():
        if not isinstance(section, dict):
            raise ValueError(f"{path}: {name} holds {section!r}; keys with values are meant")
    return content


def parse_overrides(words: Sequence[str]) -> Layer:
    """`--train.steps 20 --model.dropout=0.1` as a layer; a value is read as YAML would read it."""
    layer: dict[str, dict[str, Any]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            raise ValueError(f"{word!r} is not understood; settings look like --train.steps 100")
        if not has_value:
            if not rest:
                raise ValueError(f"{word} needs a value after it")
            value = rest.pop(0)
        section, _, key = name.partition(".")
        layer.setdefault(section, {})[key.replace("-", "_")] = read_yaml(value, name=word)
    return layer


# --- layers -> RunConfig
# -------------------------------------------------------------------------------------


def compose(layers: Iterable[Layer]) -> RunConfig:
    """A RunConfig from layers, later ones winning; raises ValueError for a wrong key or value."""
    merged: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for layer in layers:
        for name, section in layer.items():
            if name not in SECTIONS:
                raise ValueError(f"there is no section {name!r}{_nearest(name, SECTIONS)}")
            known = [f.name for f in fields(SECTIONS[name])]
            for key in section:
                if key not in known:
                    full = [f"{name}.{k}" for k in known]
                    raise ValueError(f"there is no {name}.{key}{_nearest(f'{name}.{key}', full)}")
            if name == "train" and "minutes" in section and "steps" not in section:
                # How long is one question with two keys: the later layer's answer counts.
                merged[name].pop("steps", None)
            if name == "model" and section.get("preset") is not None:
                # A preset is as strong as the layer that names it: a recipe's sizes, which are
                # another model's, give way to a preset of the command line.
                for key in model_defaults({"preset": section["preset"]}):
                    merged[name].pop(key, None)
            merged[name].update(section)
    built = {}
    for name, kind in SECTIONS.items():
        section = merged[name]
        if name == "model":
            section = {**model_defaults(section), **section}
        built[name] = _build(kind, section, name)
    return RunConfig(**built)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def _build(kind: type[Any], section: Mapping[str, Any], name: str) -> Any:
    hints = get_type_hints(kind)
    return kind(**{k: _convert(v, hints[k], f"{name}.{k}") for k, v in section.items()})


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type that a field declares, or a ValueError that says what would be legal."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        wants_list = isinstance(value, list | tuple)
        fitting = [o for o in options if (get_origin(o) is tuple) == wants_list]
        return _convert(value, next(o for o in (*fitting, *options) if o is not type(None)), name)
    if is_dataclass(hint):
        return _convert_entry(value, hint, name)
    if origin is Literal:
        if value in options:
            return value
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, options))}")
    if origin is tuple:
        values = value.split(",") if isinstance(value, str) else value
        values = values if isinstance(values, list | tuple) else [values]
        return tuple(_convert(v, options[0], name) for v in values)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; it must be a finite number")
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 is a whole number that YAML spells as a float
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if type(value) is not hint:
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ValueError(f"{name} is {value!r}; it must be {kinds.get(hint, hint)}")
    return value


def _convert_entry(value: Any, kind: Any, name: str) -> Any:
    """An entry of a list, such as {path: a, weight: 1}."""
    known = [f.name for f in fields(kind)]
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} has the entry {value!r}; legal: keys of {', '.join(known)}")
    for key in value:
        if key not in known:
            raise ValueError(f"{name}: an entry has no {key!r}{_nearest(str(key), known)}")
    if "path" not in value:
        raise ValueError(f"{name} has an entry without a path")
    return _build(kind, value, name)


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Plain scalars and lists, complete: what config.yaml holds."""
    return {
        name: {k: _plain(v) for k, v in section.items()} for name, section in asdict(config).items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: each for key, each in value.items() if each is not None}
    return value


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)


def default_of(entry: Field[Any]) -> Any:
    """A field's default for help texts; None where it has none."""
    return None if entry.default is MISSING else entry.default
