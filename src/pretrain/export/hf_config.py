"""config.json of transformers <-> `ModelConfig`.

Settings that our decoder does not have (another activation, scaled attention, windows) are a
FormatError with key and value; nothing is guessed, and nothing is silently dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pretrain.export.families import FORMATS, checked_config, is_native
from pretrain.export.layouts import FormatError
from pretrain.model.config import ModelConfig
from pretrain.model.families import FAMILIES

OWN_TYPE = "pretrain"
# With the value 1 these change nothing, and transformers' own class ignores them.
_ROPE_ONES = frozenset({"partial_rotary_factor", "attention_factor"})
_ROPE_KEYS = {
    "rope_factor": "factor",
    "rope_low_factor": "low_freq_factor",
    "rope_high_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}


def _repeated_keys(config: ModelConfig) -> dict[str, Any]:
    """What the section `pretrain` has too, under the keys that other programs read."""
    return {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "max_position_embeddings": config.window_tokens,
        "tie_word_embeddings": config.tied_head,
    }


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The architecture's part of config.json."""
    if not is_native(config):
        own = {**asdict(config), "d_ff": config.feed_forward_width, "preset": None}
        return {
            "model_type": OWN_TYPE,
            "architectures": ["PretrainForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_pretrain.PretrainConfig",
                "AutoModelForCausalLM": "modeling_pretrain.PretrainForCausalLM",
            },
            "pretrain": own,
            **_repeated_keys(config),
        }
    hf = FORMATS[config.family]
    values = {**asdict(config), "n_kv_heads": config.kv_heads, "d_ff": config.feed_forward_width}
    content = {"model_type": hf.model_type, "architectures": [hf.architecture], **hf.fixed}
    # We have no padding; a class whose default is an id would not train that row.
    content["pad_token_id"] = None
    content |= {key: values[field] for field, key in hf.keys.items()}
    if config.position == "rotary":
        content["rope_theta"] = config.rope_theta
        if config.rope_factor != 1.0:
            scaling = {key: values[field] for field, key in _ROPE_KEYS.items()}
            content["rope_scaling"] = {"rope_type": "llama3", **scaling}
    if "dropout" in hf.keys:
        content["embd_pdrop"] = config.dropout
        content["attn_pdrop"] = config.dropout if config.attention_dropout else 0.0
    return content


def from_hf_config(content: Mapping[str, Any]) -> ModelConfig:
    """The architecture of a config.json. FormatError if our decoder is not that architecture."""
    model_type = content.get("model_type")
    if model_type == OWN_TYPE:
        values = content.get("pretrain")
        if not isinstance(values, dict):
            raise FormatError(
                f"config.json must have a section 'pretrain' (got {values!r:.60}); export the "
                "model again"
            )
        config = checked_config(values)
        _check_keys(content, _repeated_keys(config))
        return config
    by_type = {hf.model_type: family for family, hf in FORMATS.items()}
    if model_type not in list(by_type):  # it may be a list
        known = ", ".join([*by_type, OWN_TYPE])
        raise FormatError(f"model_type must be one of {known} (got {model_type!r:.60})")
    hf = FORMATS[by_type[model_type]]
    _check_keys({**hf.defaults, **content}, hf.fixed)
    values = dict(FAMILIES[by_type[model_type]])
    for field, key in hf.keys.items():
        if key not in content and key not in hf.defaults:
            raise FormatError(f"config.json must have the key {key!r}, for model.{field}")
        values[field] = content.get(key, hf.defaults.get(key))
    if values["position"] == "rotary":
        values |= _rotary_values(content)
    if "dropout" in hf.keys:
        # GPT and GPT-2 have three dropout rates; we have one, and attention may have none.
        dropout = values["dropout"]
        attention = content.get("attn_pdrop", dropout)
        embedding = content.get("embd_pdrop", dropout)
        if embedding != dropout or attention not in (0, dropout):
            raise FormatError(
                "resid_pdrop, embd_pdrop and attn_pdrop must be equal, or attn_pdrop 0 (got "
                f"{dropout!r:.60}, {embedding!r:.60} and {attention!r:.60}); they matter in "
                "training only, so the file may be edited"
            )
        values["attention_dropout"] = bool(attention == dropout)
    config = checked_config(values)
    if content.get("head_dim") is not None:
        _check_keys(content, {"head_dim": config.d_head})
    return config


def _check_keys(content: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """FormatError that lists all keys with another value than this architecture's."""
    wrong = [
        f"{key} must be {value!r} (got {content[key]!r:.60})"
        for key, value in fixed.items()
        if key in content and content[key] != value
    ]
    if wrong:
        raise FormatError(f"this decoder cannot compute the model: {'; '.join(wrong)}")


def _rotary_values(content: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config, in the spelling of transformers 4 or 5. A setting that is in
    two places must be the same there: which one wins has changed between releases."""
    sections = {name: content.get(name) for name in ("rope_parameters", "rope_scaling")}
    for name, section in sections.items():
        if section is not None and not isinstance(section, Mapping):
            raise FormatError(f"{name} must be an object or null (got {section!r:.60})")
    top_level = {
        key: content[key]
        for key in ("rope_theta", "original_max_position_embeddings", *sorted(_ROPE_ONES))
        if content.get(key) is not None
    }
    rope: dict[str, Any] = {}
    for section in [*sections.values(), top_level]:
        for key, value in (section or {}).items():
            name = "rope_type" if key == "type" else key  # the older spelling of transformers 4
            if value is not None and rope.setdefault(name, value) != value:
                raise FormatError(
                    f"{name} must have one value (got {rope[name]!r:.60} and {value!r:.60})"
                )
    kind = rope.pop("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise FormatError(f"rotary positions must be of type default or llama3 (got {kind!r:.60})")
    values = {"rope_theta": rope.pop("rope_theta", 10_000.0)}
    if kind == "llama3":
        values |= {field: rope.pop(key, None) for field, key in _ROPE_KEYS.items()}
    elif "original_max_position_embeddings" in top_level:
        del rope["original_max_position_embeddings"]  # has no effect without scaling
    for key, value in rope.items():
        if key not in {"factor", *_ROPE_ONES} or value != 1:
            raise FormatError(
                f"{key} must be absent for rotary positions of type {kind} (got {value!r:.60})"
            )
    return values
