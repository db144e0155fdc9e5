"""A run's config: YAML and the command line in, one validated RunConfig out, and back to YAML.

Values come in layers (defaults of the family and preset, a recipe or file, the command line), and
later ones win. Each package declares its section in its own `config` module. The merged values are
validated first and the RunConfig is built from valid ones; one error lists everything that is
wrong, before torch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from pretrain.corpus.config import CorpusConfig
from pretrain.data.config import DataConfig
from pretrain.evaluate.config import EvaluateConfig
from pretrain.model.config import ModelConfig, model_defaults, replaced_fields
from pretrain.optim.config import OptimizerConfig, ScheduleConfig
from pretrain.parallel.config import ParallelConfig
from pretrain.report.config import ReportConfig
from pretrain.tokenizer.config import TokenizerConfig
from pretrain.train.config import TrainConfig, batch_errors
from pretrain.validation import (
    MAX_DIGITS,
    ConfigError,
    FieldError,
    build,
    did_you_mean,
    invalid_fields,
    nearest,
    raise_errors,
    shown,
    suggestion,
    type_hints,
)

Layer = Mapping[str, Mapping[str, Any]]
"""Values by section and key, as YAML gave them."""

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
# Names that nanoGPT, litgpt, torchtitan and transformers have for our settings.
_OTHER_NAMES = {
    name: setting
    for setting, names in {
        "data.source": "dataset data_dir dataset_path train_data train_file",
        "tokenizer.name": "tokenizer tokenizer_dir tokenizer_name tokenizer_path",
        "tokenizer.vocab_size": "vocab n_vocab padded_vocab_size",
        "model.n_layers": "n_layer num_layers num_hidden_layers depth",
        "model.n_heads": "n_head num_heads num_attention_heads",
        "model.n_kv_heads": "n_kv_head num_key_value_heads n_query_groups",
        "model.d_model": "n_embd n_embed dim hidden_size hidden_dim embed_dim",
        "model.d_ff": "intermediate_size n_inner ffn_dim",
        "model.context_length": "block_size seq_len n_ctx n_positions sequence_length max_seq_len "
        "max_seq_length max_position_embeddings",
        "model.norm_epsilon": "norm_eps rms_norm_eps layer_norm_epsilon",
        "model.tied_head": "tie_word_embeddings",
        "optimizer.learning_rate": "lr max_lr",
        "optimizer.beta1": "betas adam_beta1",
        "optimizer.clip": "grad_clip max_norm max_grad_norm",
        "schedule.name": "lr_scheduler_type decay_lr",
        "schedule.warmup_steps": "warmup warmup_iters lr_warmup_steps num_warmup_steps",
        "schedule.final_fraction": "min_lr",
        "train.steps": "iters max_iters max_steps n_steps num_steps",
        "train.batch_tokens": "batch_size global_batch_size train_batch_size",
        "train.micro_batch_rows": "micro_batch_size gradient_accumulation_steps",
        "train.evaluate_every": "eval_interval eval_steps",
        "train.save_every": "save_interval save_steps",
        "train.precision": "dtype torch_dtype bf16",
    }.items()
    for name in names.split()
}
_MAX_FILE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that a run depends on, one section a package."""

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

    def conflicts(self) -> Iterator[FieldError]:
        """Yield what does not fit between sections: full names of fields, and a message."""
        yield from self.parallel.model_errors(self.model)
        for axis in ("tensor", "context", "pipeline") if self.train.teacher else ():
            if (size := getattr(self.parallel, axis)) > 1:
                message = f"parallel.{axis} is {size}; it must be 1 with train.teacher"
                yield f"train.teacher parallel.{axis}", message
        context, batch = self.model.context_length, self.train.batch_tokens
        # A context longer than a batch may be shortened later, if the text is shorter still.
        if context is not None and batch is not None and context <= batch:
            yield from batch_errors(
                batch, context_length=context, micro_batch_rows=self.train.micro_batch_rows
            )


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in fields(RunConfig)}
Rules = Callable[[RunConfig], Iterable[FieldError]]


def compose(layers: Iterable[Layer], *, rules: Rules | None = None) -> RunConfig:
    """Merge layers, later ones winning, into a RunConfig.

    Args:
        layers: Values as `read_file` and `parse_overrides` return them.
        rules: Further checks that only the caller can do, such as whether files exist.

    Raises:
        ConfigError: It lists everything that is wrong. What depends on an invalid field is not
            checked.
    """
    merged: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    unknown: dict[str, set[str]] = {name: set() for name in SECTIONS}
    errors: list[FieldError] = []
    for layer in layers:
        for name, values in layer.items():
            if name not in SECTIONS:
                section, _, key = (setting_named(str(name)) or "").partition(".")
                hint = suggestion(name, SECTIONS)
                if section:
                    hint = f"write `{section}:`, and indented below it `{key}: {values}`"
                    unknown[section].add(key)
                elif close := nearest(name, SECTIONS):  # it may have what would be missed below
                    unknown[close] |= type_hints(SECTIONS[close]).keys()
                errors.append(("", f"there is no section {shown(name)}; {hint}"))
            elif not isinstance(values, Mapping):
                message = f"{name} is {shown(values)}; it must be a section of keys with values"
                key, _, value = str(values).partition(" ")
                if key in type_hints(SECTIONS[name]):
                    message += f", such as `{key}: {value or '...'}`"
                errors.append(("", message))
                unknown[name] |= type_hints(SECTIONS[name]).keys()
            else:
                _merge(merged[name], values, name)
    model = merged["model"]
    try:
        merged["model"] = model_defaults(model) | model
    except ConfigError as error:
        errors += error.errors
        merged["model"] = {k: v for k, v in model.items() if k not in ("preset", "family")}
        unknown["model"] |= type_hints(ModelConfig).keys() - merged["model"].keys()

    sections = {}
    invalid = set()
    for name, kind in SECTIONS.items():
        for key in [key for key in merged[name] if key not in type_hints(kind)]:
            renamed = RENAMED_KEYS.get(f"{name}.{key}")
            setting = renamed or setting_named(str(key))
            if setting is None:
                continue  # `build` reports it, with the nearest key of the section
            del merged[name][key]
            section, _, new_key = setting.partition(".")
            unknown[section].add(new_key)
            hint = f"it is {renamed} now, rename the key" if renamed else did_you_mean(setting)
            errors.append(("", f"there is no {name}.{key}; {hint}"))
        config, wrong = build(kind, merged[name], name, unknown=unknown[name])
        errors += wrong
        names = invalid_fields(wrong) | unknown[name] if config else type_hints(kind).keys()
        invalid |= {f"{name}.{key}" for key in names}
        sections[name] = config or kind()

    composed = RunConfig(**sections)
    conflicts = list(composed.conflicts())
    if rules is not None:
        conflicts += rules(composed)
    raise_errors(errors + [each for each in conflicts if invalid.isdisjoint(each[0].split())])
    return composed


def setting_named(name: str) -> str | None:
    """Return the setting that an unknown name means: its name without the section, in another
    section, or in another program."""
    name = name.replace("-", "_")
    sections = [each for each, kind in SECTIONS.items() if name in type_hints(kind)]
    if len(sections) == 1:
        return f"{sections[0]}.{name}"
    section, _, key = name.partition(".")
    if key:
        is_known = section in SECTIONS and key in type_hints(SECTIONS[section])
        return name if is_known else setting_named(key)
    return _OTHER_NAMES.get(name)


def _merge(merged: dict[str, Any], values: Mapping[str, Any], section: str) -> None:
    """Add a layer's values of a section to those of earlier layers."""
    if section == "train" and "minutes" in values and "steps" not in values:
        # Both keys say how long to train: a later layer's answer replaces an earlier one's.
        merged.pop("steps", None)
    if section == "model":
        # A preset or size is as strong as the layer that names it: it replaces the sizes of earlier
        # layers.
        with suppress(ValueError):  # reported when all layers are known
            for key in replaced_fields(values):
                merged.pop(key, None)
    merged.update(values)


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return all fields as plain scalars, lists and dicts: the content of config.yaml."""
    return {
        name: {key: _plain(value) for key, value in section.items()}
        for name, section in asdict(config).items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: each for key, each in value.items() if each is not None}
    return value


def to_yaml(config: RunConfig) -> str:
    """Return the text of config.yaml."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)


# --- The command line -----------------------------------------------------------------------------


def parse_overrides(args: Sequence[str], *, others: list[str] | None = None) -> Layer:
    """Return `--train.steps 20 --model.dropout=0.1` as a layer; values are read as YAML.

    Other arguments are appended to `others`; without it they are errors.
    """
    layer: dict[str, dict[str, Any]] = {}
    errors: list[FieldError] = []
    remaining = list(args)
    while remaining:
        arg = remaining.pop(0)
        name, has_value, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or "." not in name:
            if others is not None:
                others.append(arg)
                continue
            errors.append(("", f"{arg!r} is not a setting; settings look like --train.steps 100"))
            continue
        if not has_value:
            if not remaining:
                errors.append(("", f"{arg} needs a value after it"))
                continue
            value = remaining.pop(0)
        section, _, key = name.partition(".")
        try:
            layer.setdefault(section, {})[key.replace("-", "_")] = read_yaml(value, name=arg)
        except ValueError as error:
            errors.append(("", str(error)))
    raise_errors(errors)
    return layer


# --- YAML, version 1.2's core schema --------------------------------------------------------------

_NUMBER = re.compile(
    r"""^(?:[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?
          |0o[0-7]+|0x[0-9a-fA-F]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_YAML_HINTS = {
    r"found character '\t'": "it is indented with a tab; it must be indented with spaces",
    "mapping values are not allowed": "a colon too many, or none in the line before, or indented "
    "further than that; a text with a colon must be in quotes",
    "could not find expected ':'": "a colon is missing in the line before",
    "expected <block end>": "it must be indented as the other keys of its section are",
}
_NULL = ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"))
_BOOL = ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"))
_FLOAT = ("tag:yaml.org,2002:float", _NUMBER)


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    text = node.value.lower()
    if len(text) > MAX_DIGITS:
        mark: Any = node.start_mark
        key = mark.buffer[: mark.pointer].rpartition("\n")[2].strip()
        raise _yaml_error(f"{key} a number of {len(text)} characters", node)
    if text.lstrip("+-") in (".inf", ".nan"):
        return float(text.replace(".", ""))
    if text.startswith(("0x", "0o")):
        return int(text, 0)
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


def _yaml_error(problem: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


class _CoreLoader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where `no` is false and `3e-4` is text; this reads 1.2's core schema.

    Aliases, tags and duplicate keys are errors: no config needs them, and all can hide an error.
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
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.tag is not None:
            raise _yaml_error("aliases (*) and tags (!) are not supported", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            text = str(key.value)  # PyYAML itself rejects a list as a key
            if text in seen:
                raise _yaml_error(f"duplicate key {text!r}", key)
            seen.add(text)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, *, name: str) -> Any:
    """Return the value of a YAML text; ValueError gives `name`, line and column of an error."""
    try:
        return _CoreLoader(text).get_single_data()
    except yaml.YAMLError as error:
        parts = (getattr(error, part, None) for part in ("context", "problem"))
        hint: Any = ", ".join(filter(None, parts)) or error
        hint = next((h for problem, h in _YAML_HINTS.items() if problem in str(error)), hint)
        if mark := getattr(error, "problem_mark", None):
            hint = f"line {mark.line + 1}: {hint}"
        raise ValueError(f"{name} is not valid YAML: {hint}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None


def read_file(path: Path) -> Layer:
    """Return a config file as a layer; ValueError if it is not a mapping of sections."""
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {_MAX_FILE_BYTES:,} bytes: not a config")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    content = read_yaml(text, name=str(path))
    if not isinstance(content, dict | None):
        raise ValueError(f"{path} contains {shown(content)}; it must have sections like `train:`")
    return content or {}
