"""config.json of transformers <-> `ModelConfig`: one table of keys a family, used both ways.

What a file says that our decoder cannot be (another activation, scaled attention, windows) is a
FormatError that names key and value; nothing is guessed, and nothing is silently dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from pretrain.export.layouts import HUGGING_FACE, OWN, FormatError, Layout
from pretrain.model import ModelConfig
from pretrain.model.families import FAMILIES

OWN_TYPE = "pretrain"
# Of these a family fixes none: they are sizes and numbers, or matter in training only.
_FREE = frozenset(
    """
    family preset n_layers n_heads n_kv_heads d_model d_ff context_length dropout norm_epsilon
    rope_theta rope_factor rope_original_context rope_low_factor rope_high_factor initialization
    attention_dropout
    """.split()
)


@dataclass(frozen=True, slots=True)
class Keys:
    """How transformers spells a family."""

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    """Our field -> their key."""
    defaults: Mapping[str, Any]
    """What transformers takes where a key is missing."""
    fixed: Mapping[str, Any]
    """Keys of which any other value is another architecture."""


KEYS: dict[str, Keys] = {
    "gpt": Keys(
        "openai-gpt",
        "OpenAIGPTLMHeadModel",
        {
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "d_model": "n_embd",
            "context_length": "n_positions",
            "norm_epsilon": "layer_norm_epsilon",
            "dropout": "resid_pdrop",
        },
        {"n_positions": 512, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1},
        {"afn": "gelu", "tie_word_embeddings": True},
    ),
    "gpt2": Keys(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "d_model": "n_embd",
            "d_ff": "n_inner",
            "context_length": "n_positions",
            "norm_epsilon": "layer_norm_epsilon",
            "dropout": "resid_pdrop",
        },
        {"n_positions": 1024, "n_inner": None, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1},
        {
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
    ),
    "llama": Keys(
        "llama",
        "LlamaForCausalLM",
        {
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "d_model": "hidden_size",
            "d_ff": "intermediate_size",
            "context_length": "max_position_embeddings",
            "norm_epsilon": "rms_norm_eps",
            "tied_head": "tie_word_embeddings",
        },
        {
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    ),
}
# Where 1 is given for these they change nothing, and transformers' own class ignores them.
_ROPE_ONES = frozenset({"partial_rotary_factor", "attention_factor"})
_LARGEST_WHOLE = 1 << 31
_ROPE = {
    "rope_factor": "factor",
    "rope_low_factor": "low_freq_factor",
    "rope_high_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}


def is_native(config: ModelConfig) -> bool:
    """Whether transformers has a class of its own for this very architecture."""
    if config.family not in KEYS:
        return False
    family = ModelConfig(**FAMILIES[config.family]())
    ours, theirs = asdict(config), asdict(family)
    free = _FREE | ({"tied_head"} if config.family == "llama" else set())
    same = all(ours[name] == theirs[name] for name in ours.keys() - free)
    if config.family == "gpt":
        same = same and config.feed_forward_width == 4 * config.d_model
    return same and (config.family == "llama" or config.kv_heads == config.n_heads)


def layout_of(config: ModelConfig) -> Layout:
    """The names of the tensors of a model directory."""
    return HUGGING_FACE[config.family] if is_native(config) else OWN


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of the architecture."""
    if not is_native(config):
        whole = {**asdict(config), "d_ff": config.feed_forward_width, "preset": None}
        return {
            "model_type": OWN_TYPE,
            "architectures": ["PretrainForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_pretrain.PretrainConfig",
                "AutoModelForCausalLM": "modeling_pretrain.PretrainForCausalLM",
            },
            "pretrain": whole,
            # What other programs look for under these names.
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "max_position_embeddings": config.window_tokens,
            "tie_word_embeddings": config.tied_head,
        }
    keys = KEYS[config.family]
    values = {**asdict(config), "n_kv_heads": config.kv_heads, "d_ff": config.feed_forward_width}
    content = {"model_type": keys.model_type, "architectures": [keys.architecture], **keys.fixed}
    content |= {theirs: values[ours] for ours, theirs in keys.fields.items()}
    if config.family == "llama":
        content["rope_theta"] = config.rope_theta
        if config.rope_factor != 1.0:
            stretched = {theirs: values[ours] for ours, theirs in _ROPE.items()}
            content["rope_scaling"] = {"rope_type": "llama3", **stretched}
    else:
        content["embd_pdrop"] = config.dropout
        content["attn_pdrop"] = config.dropout if config.attention_dropout else 0.0
    return content


def from_hf_config(content: Mapping[str, Any]) -> ModelConfig:
    """The architecture of a config.json. FormatError for one that is not ours."""
    kind = content.get("model_type")
    if kind == OWN_TYPE:
        values = content.get("pretrain")
        if not isinstance(values, dict):
            raise FormatError("the config has no section 'pretrain'")
        return _built(values)
    family = next((name for name, keys in KEYS.items() if keys.model_type == kind), None)
    if family is None:
        known = ", ".join([*(keys.model_type for keys in KEYS.values()), OWN_TYPE])
        raise FormatError(f"model_type {kind!r:.60} is not one of {known}")
    keys = KEYS[family]
    wrong = [
        f"{key} is {content[key]!r:.60}, not {value!r}"
        for key, value in keys.fixed.items()
        if key in content and content[key] != value
    ]
    if wrong:
        raise FormatError(f"this is not the architecture of {family}: {'; '.join(wrong)}")
    values = FAMILIES[family]()
    for ours, theirs in keys.fields.items():
        if theirs not in content and theirs not in keys.defaults:
            raise FormatError(f"the config has no {theirs!r}")
        values[ours] = content.get(theirs, keys.defaults.get(theirs))
    if family == "llama":
        values |= _rotary(content)
    else:
        values |= _dropout(content, values["dropout"])
    config = _built(values)
    width = content.get("head_dim")
    if width is not None and width != config.d_head:
        raise FormatError(
            f"head_dim {width!r:.60} times {config.n_heads} heads is not the width "
            f"{config.d_model}, as it is in this decoder"
        )
    return config


def _dropout(content: Mapping[str, Any], dropout: Any) -> dict[str, Any]:
    """GPT and GPT-2 have three shares of dropout, we have one, which may spare attention."""
    attention, embedding = (content.get(key, dropout) for key in ("attn_pdrop", "embd_pdrop"))
    if embedding != dropout or attention not in (0, dropout):
        raise FormatError(
            f"resid_pdrop is {dropout!r:.60}, embd_pdrop {embedding!r:.60} and attn_pdrop "
            f"{attention!r:.60}; legal: one value, or 0 for attn_pdrop (they matter in training "
            "only, so the file may be edited)"
        )
    return {"attention_dropout": bool(attention == dropout)}


def _rotary(content: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings of Llama's config, in the spelling of transformers 4 or 5. What stands in two
    places must say the same: which of them wins has changed from one release to the next."""
    places = {name: content.get(name) for name in ("rope_parameters", "rope_scaling")}
    for name, place in places.items():
        if place is not None and not isinstance(place, Mapping):
            raise FormatError(f"{name} is {place!r:.60}; legal: an object, or null")
    given = [dict(place) for place in places.values() if place]
    above = {
        key: content[key]
        for key in ("rope_theta", "original_max_position_embeddings", *sorted(_ROPE_ONES))
        if content.get(key) is not None
    }
    found: dict[str, Any] = {}
    for place in [*given, above]:
        for key, value in place.items():
            # transformers 4 said `type`, and later both.
            name = "rope_type" if key == "type" else key
            if value is not None and found.setdefault(name, value) != value:
                raise FormatError(
                    f"{name} is given as {found[name]!r:.60} and as {value!r:.60}; legal: one value"
                )
    kind = found.pop("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise FormatError(f"rotary positions of the kind {kind!r:.60}; legal: default, llama3")
    values = {"rope_theta": found.pop("rope_theta", 10_000.0)}
    if kind == "llama3":
        values |= {ours: found.pop(theirs, None) for ours, theirs in _ROPE.items()}
    elif "original_max_position_embeddings" in above:
        del found["original_max_position_embeddings"]  # of no meaning without stretching
    for key, value in found.items():
        if key not in {"factor", *_ROPE_ONES} or value != 1:
            raise FormatError(
                f"{key} is {value!r:.60}; legal for rotary positions of the kind {kind}: none"
            )
    return values


def _built(values: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from values of a file, each checked for its type."""
    hints = get_type_hints(ModelConfig)
    names = {each.name for each in fields(ModelConfig)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            raise FormatError(
                f"the config has a field {name:.60}; legal: {', '.join(sorted(names))}"
            )
        hint = hints[name]
        if not _is_a(value, hint):
            legal = hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")
            raise FormatError(f"the config says {name} is {value!r:.60}; legal: {legal}")
        # Larger ones cannot be made floats, or lengths, by what comes next.
        if type(value) is int and abs(value) >= _LARGEST_WHOLE:
            raise FormatError(
                f"the config says {name} is {value!r:.60}; legal: below {_LARGEST_WHOLE:,}"
            )
        checked[name] = float(value) if hint is float else value
    if checked.get("context_length") is None:
        raise FormatError("the config says context_length is None; legal: a whole number")
    try:
        return ModelConfig(**checked)
    except ValueError as error:
        raise FormatError(str(error)) from None


def _is_a(value: Any, hint: Any) -> bool:
    options = get_args(hint)
    if get_origin(hint) is not None and type(None) not in options:
        return value in options  # a Literal
    kinds = options or (hint,)
    return type(value) in kinds or (float in kinds and type(value) is int)
