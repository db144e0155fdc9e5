"""The rooms' configs composed: YAML and the command line in, one checked RunConfig out, and back.

Values come in layers (a family's and preset's defaults, a recipe or file, the command line) and
later ones win. An unknown key names its nearest neighbour, a wrong value says what would be legal;
one error lists every mistake, and all of it happens before torch is imported.

Each section's class yields its `mistakes()`: fields and a sentence. None is said of a wrong field.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pretrain.corpus.config import CorpusConfig
from pretrain.data.config import DataConfig
from pretrain.evaluate.config import EvaluateConfig
from pretrain.model.config import ModelConfig, model_defaults, replaced_by
from pretrain.optim.config import OptimizerConfig, ScheduleConfig
from pretrain.parallel.config import ParallelConfig
from pretrain.report.config import ReportConfig
from pretrain.tokenizer.config import TokenizerConfig
from pretrain.train.config import TrainConfig, mistakes_of_batch

Layer = Mapping[str, Mapping[str, Any]]
RENAMED_KEYS = {
    "model.recall": "model.induction",
    "optimizer.embedding_rate": "optimizer.embedding_lr_mult",
    "optimizer.head_rate": "optimizer.head_lr_mult",
    "optimizer.tuned_batch_tokens": "optimizer.base_batch_tokens",
    "optimizer.tuned_width": "optimizer.base_width",
    "parallel.recompute": "parallel.activation_checkpointing",
    "schedule.past": "schedule.history",
}
"""Old names of keys: a config that has one was written before they were renamed."""
_LARGEST_FILE_BYTES, _LONGEST_NUMBER, _DEEPEST = 1 << 18, 100, 50


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that a run depends on, one section a room."""

    data: DataConfig = field(default_factory=DataConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What does not fit between sections: full names of fields, and a sentence."""
        yield from self.parallel.mistakes_of_model(self.model)
        context, batch = self.model.context_length, self.train.batch_tokens
        # A longer context than a batch may be too long for the text, which is better said later.
        if context is not None and batch is not None and context <= batch:
            yield from mistakes_of_batch(
                batch, context_length=context, micro_batch_rows=self.train.micro_batch_rows
            )


SECTIONS: dict[str, type[Any]] = {f.name: f.default_factory for f in fields(RunConfig)}  # type: ignore[misc]
Rules = Callable[[RunConfig], Iterable[tuple[str, str]]]

# --- YAML, version 1.2's core schema -----------------------------------------------------------

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
    if len(text) > _LONGEST_NUMBER:
        problem = f"a number of {len(text)} characters"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    if text.lstrip("+-") in (".inf", ".nan"):
        return float(text.replace(".", ""))
    if text.startswith(("0x", "0o")):
        return int(text, 0)
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


class _CoreLoader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where `no` is false and `3e-4` is text; this reads 1.2's core schema.

    Aliases, tags and repeated keys are refused: none is ever meant in a config, and all hide
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

    def fetch_flow_collection_start(self, kind: Any) -> None:
        if self.flow_level > _DEEPEST:  # PyYAML would go on for a second
            raise RecursionError
        super().fetch_flow_collection_start(kind)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.tag is not None:
            problem = "aliases (*) and tags (!) are not used"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            word = str(key.value)  # a list as a key is refused by PyYAML itself
            if word in seen:
                problem = f"the key {word!r} stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(word)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, *, name: str) -> Any:
    """The value of a YAML text; ValueError names `name`, line and column for anything that is not
    right."""
    try:
        return _CoreLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not the YAML that is meant here: {error}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None


def read_file(path: Path) -> Layer:
    """A config file as a layer of sections; raises ValueError where it is not one."""
    if path.stat().st_size > _LARGEST_FILE_BYTES:
        raise ValueError(f"{path} has more than {_LARGEST_FILE_BYTES:,} bytes: not a config")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    content = read_yaml(text, name=str(path))
    if not isinstance(content, dict | None):
        raise ValueError(f"{path} holds {_shown(content)}; sections such as `train:` are meant")
    return content or {}


def parse_overrides(words: Sequence[str]) -> Layer:
    """`--train.steps 20 --model.dropout=0.1` as a layer; a value is read as YAML would read it."""
    layer: dict[str, dict[str, Any]] = {}
    mistakes = _Mistakes()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            mistakes.add(f"{word!r} is not understood; settings look like --train.steps 100")
            continue
        if not has_value and not rest:
            mistakes.add(f"{word} needs a value after it")
            continue
        value = value if has_value else rest.pop(0)
        section, _, key = name.partition(".")
        try:
            layer.setdefault(section, {})[key.replace("-", "_")] = read_yaml(value, name=word)
        except ValueError as error:
            mistakes.sentences.append(str(error))
    mistakes.refuse()
    return layer


class _Mistakes:
    """Sentences, and the fields that nothing more can be said about."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.doubtful: set[str] = set()

    def add(self, sentences: str, *doubtful: str) -> None:
        self.sentences += sentences.split("\n")
        self.doubtful.update(doubtful)

    def add_unknown(self, said: str, word: str, known: Iterable[str], *, place: str = "") -> None:
        """A word that is not among the known ones, of which the nearest was meant, if any is."""
        if len(self.sentences) >= 100:
            return self.add(said)  # a search takes half a millisecond
        close = difflib.get_close_matches(word, list(known), 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        self.add(f"{said}; {hint}", *(f"{place}{meant}" for meant in close))

    @contextmanager
    def caught(self, *doubtful: str) -> Iterator[None]:
        """Take the sentences of a ValueError that is raised inside."""
        try:
            yield
        except ValueError as error:
            self.add(str(error), *doubtful)

    def ask(self, rules: Iterable[tuple[str, str]], *, section: str | None = None) -> None:
        """Take what rules say, but nothing that hangs on a doubtful field. A section's rule about
        one field is about the value that was given, and makes that field doubtful."""
        for names, sentence in rules:
            hangs_on = [f"{section}.{name}" if section else name for name in names.split()]
            if section and len(hangs_on) == 1:
                self.add(sentence, *hangs_on)
            elif self.doubtful.isdisjoint(hangs_on):
                self.add(sentence)

    def pass_on(self) -> None:
        """Raise a ValueError, one sentence a line, for whoever collects them."""
        if self.sentences:
            raise ValueError("\n".join(self.sentences))

    def refuse(self) -> None:
        """Raise a ValueError for people: the sentence, or a list of them."""
        self.sentences = list(dict.fromkeys(self.sentences))
        if len(self.sentences) > 1:
            lines = [sentence.replace("\n", "\n    ") for sentence in self.sentences]
            raise ValueError("\n  ".join([f"{len(lines)} mistakes:", *lines]))
        self.pass_on()


def compose(layers: Iterable[Layer], *, also: Rules | None = None) -> RunConfig:
    """A RunConfig from layers, later ones winning; or one ValueError that names every mistake, of
    those rules too that only the caller knows (`also`)."""
    mistakes = _Mistakes()
    merged = _merge(layers, mistakes)
    try:
        merged["model"] = {**model_defaults(merged["model"]), **merged["model"]}
    except ValueError as error:
        for key in ("preset", "family"):
            merged["model"].pop(key, None)
        given = {f"model.{key}" for key in merged["model"]}  # the rest, the preset's, is not known
        mistakes.add(str(error), *(_names("model").keys() - given))
    built = {name: _build(kind, merged[name], name, mistakes) for name, kind in SECTIONS.items()}
    config = RunConfig(**built)
    for rules in filter(None, (RunConfig.mistakes, also)):
        mistakes.ask(rules(config))
    mistakes.refuse()
    return config


def _merge(layers: Iterable[Layer], mistakes: _Mistakes) -> dict[str, dict[str, Any]]:
    """The known keys of all layers; unknown sections and keys go into `mistakes`."""
    merged: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for layer in layers:
        for name, section in layer.items():
            if name not in SECTIONS:
                mistakes.add_unknown(f"there is no section {_shown(name)}", str(name), SECTIONS)
                continue
            known = _names(name)
            if not isinstance(section, Mapping):
                mistakes.add(f"{name} holds {_shown(section)}; keys with values are meant", *known)
                continue
            for full in (f"{name}.{key}" for key in section):
                if full in RENAMED_KEYS:
                    mistakes.add(
                        f"{full} is now {RENAMED_KEYS[full]}: this config was written by an older "
                        "pretrain; rename the key"
                    )
                elif full not in known:
                    mistakes.add_unknown(f"there is no {repr(full)[1:-1]:.80}", full, known)
            section = {key: each for key, each in section.items() if f"{name}.{key}" in known}
            if name == "train" and "minutes" in section and "steps" not in section:
                # How long is one question with two keys: the later layer's answer counts.
                merged[name].pop("steps", None)
            if name == "model":
                # A preset or size is as strong as the layer that names it: a recipe's sizes give
                # way to those of the command line.
                with suppress(ValueError):  # an unknown one is named later
                    for key in replaced_by(section):
                        merged[name].pop(key, None)
            merged[name].update(section)
    return merged


def _names(section: str) -> dict[str, None]:
    return {f"{section}.{f.name}": None for f in fields(SECTIONS[section])}


def _shown(value: Any) -> str:
    """A value as it was given, in one line and cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _build(kind: type[Any], values: Mapping[str, Any], name: str, mistakes: _Mistakes) -> Any:
    """A config of that kind; what is wrong with it goes into `mistakes`, and whatever is wrong by
    itself is left at its default."""
    hints = get_type_hints(kind)
    # Not by its class, which would raise at once.
    config = object.__new__(kind)
    for each in fields(kind):
        value = default_of(each)
        if each.name in values:
            full = f"{name}.{each.name}"
            with mistakes.caught(full):
                value = _convert(values[each.name], hints[each.name], full)
        object.__setattr__(config, each.name, value)
    mistakes.ask(config.mistakes(), section=name)
    for each in fields(kind):
        if f"{name}.{each.name}" in mistakes.doubtful:
            object.__setattr__(config, each.name, default_of(each))
    return config


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type that a field declares, or a ValueError that says what would be legal, a
    line for each entry of a list that is wrong."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        wants_list = isinstance(value, list | tuple)
        fitting = [o for o in options if (get_origin(o) is tuple) == wants_list]
        return _convert(value, next(o for o in (*fitting, *options) if o is not type(None)), name)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e6 is a whole number that YAML spells as a float
    if isinstance(value, int) and abs(value) >= 10**_LONGEST_NUMBER:
        raise ValueError(f"{name} has more than {_LONGEST_NUMBER} digits; no setting is as large")
    if is_dataclass(hint):
        return _convert_entry(value, hint, name)
    if origin is Literal:
        if value in options:
            return value
        legal = ", ".join(map(str, options))
        raise ValueError(f"{name} is {_shown(value)}; it must be one of {legal}")
    if origin is tuple:
        return _convert_list(value, options[0], name)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; it must be a finite number")
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if type(value) is not hint:
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ValueError(f"{name} is {_shown(value)}; it must be {kinds.get(hint, hint)}")
    return value


def _convert_list(value: Any, hint: Any, name: str) -> tuple[Any, ...]:
    """Each entry of a list, or of a text with commas, as `hint`."""
    values = value.split(",") if isinstance(value, str) else value
    mistakes, found = _Mistakes(), []
    for each in values if isinstance(values, list | tuple) else [values]:
        with mistakes.caught():
            found.append(_convert(each, hint, name))
    mistakes.pass_on()
    return tuple(found)


def _convert_entry(value: Any, kind: Any, name: str) -> Any:
    """An entry of a list, such as {path: a, weight: 1}."""
    known = [f.name for f in fields(kind)]
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} has the entry {_shown(value)}; legal: keys of {', '.join(known)}")
    mistakes = _Mistakes()
    for key in value:
        if key not in known:
            said = f"{name}: an entry has no {_shown(key)}"
            mistakes.add_unknown(said, str(key), known, place=f"{name}.")
    missing = [f for f in fields(kind) if f.default is MISSING and f.name not in value]
    for each in missing:
        mistakes.add(f"{name} has an entry without a {each.name}", f"{name}.{each.name}")
    if any(each.type != "str" for each in missing):
        mistakes.pass_on()
    entry = _build(kind, {**{each.name: "" for each in missing}, **value}, name, mistakes)
    mistakes.pass_on()
    return entry


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
