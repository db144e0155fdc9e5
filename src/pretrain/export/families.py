"""The names that other programs use for our families: one table.

It has the keys and tensor names of each family in transformers and, where llama.cpp has the family,
in GGUF. All code that depends on the family reads this table: a field that a format has no key for
must have the family's own value. To add a family that transformers has, add it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pretrain.export.layouts import FormatError, Layout
from pretrain.model.config import ModelConfig
from pretrain.model.families import FAMILIES
from pretrain.validation import ConfigError
from pretrain.validation import build as build_config


@dataclass(frozen=True, slots=True)
class FamilyFormat:
    """A family in transformers, and in GGUF if llama.cpp has it."""

    model_type: str
    architecture: str
    keys: Mapping[str, str]
    """Field of ModelConfig -> key of config.json."""
    defaults: Mapping[str, Any]
    """The values of transformers for missing keys."""
    fixed: Mapping[str, Any]
    """Keys for which any other value is another architecture."""
    layout: Layout
    gguf_keys: Mapping[str, str] = field(default_factory=dict)
    """Field of ModelConfig -> key of GGUF, after the family's name; none if llama.cpp lacks it."""
    gguf_layout: Layout = field(default_factory=Layout)


_GPT2_KEYS = {
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "d_model": "n_embd",
    "context_length": "n_positions",
    "norm_epsilon": "layer_norm_epsilon",
    "dropout": "resid_pdrop",
}
_GPT2_DEFAULTS = {"layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1}
_GPT2_BLOCK = {
    "h.{}.ln_1": "attention_norm",
    "h.{}.attn.c_attn": "attention.query attention.key attention.value",
    "h.{}.attn.c_proj": "attention.output",
    "h.{}.ln_2": "feed_forward_norm",
    "h.{}.mlp.c_fc": "feed_forward.up",
    "h.{}.mlp.c_proj": "feed_forward.down",
}
_LLAMA_KEYS = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "context_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied_head": "tie_word_embeddings",
}
_LLAMA_MODULES = {
    "model.embed_tokens": "token_embedding",
    "model.norm": "final_norm",
    "lm_head": "head",
    "model.layers.{}.input_layernorm": "attention_norm",
    "model.layers.{}.self_attn.q_proj": "attention.query",
    "model.layers.{}.self_attn.k_proj": "attention.key",
    "model.layers.{}.self_attn.v_proj": "attention.value",
    "model.layers.{}.self_attn.o_proj": "attention.output",
    "model.layers.{}.post_attention_layernorm": "feed_forward_norm",
    "model.layers.{}.mlp.gate_proj": "feed_forward.gate",
    "model.layers.{}.mlp.up_proj": "feed_forward.up",
    "model.layers.{}.mlp.down_proj": "feed_forward.down",
}
_GGUF_KEYS = {
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "d_model": "embedding_length",
    "d_ff": "feed_forward_length",
    "context_length": "context_length",
}
_GGUF_MODULES = {
    "token_embd": "token_embedding",
    "position_embd": "position_embedding",
    "output_norm": "final_norm",
    "output": "head",
    "blk.{}.attn_norm": "attention_norm",
    "blk.{}.attn_output": "attention.output",
    "blk.{}.ffn_norm": "feed_forward_norm",
    "blk.{}.ffn_up": "feed_forward.up",
    "blk.{}.ffn_down": "feed_forward.down",
}

FORMATS: dict[str, FamilyFormat] = {
    "gpt": FamilyFormat(
        model_type="openai-gpt",
        architecture="OpenAIGPTLMHeadModel",
        keys=_GPT2_KEYS,
        defaults={**_GPT2_DEFAULTS, "n_positions": 512},
        fixed={"afn": "gelu", "tie_word_embeddings": True},
        layout=Layout(
            {
                "tokens_embed": "token_embedding",
                "positions_embed": "position_embedding",
                "lm_head": "head",
                **_GPT2_BLOCK,
            },
            transposed=True,
            optional_prefix="transformer.",
            ignored=("h.*.attn.bias", "position_ids"),
        ),
    ),
    "gpt2": FamilyFormat(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        keys={**_GPT2_KEYS, "d_ff": "n_inner"},
        defaults={**_GPT2_DEFAULTS, "n_positions": 1024, "n_inner": None},
        fixed={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
        layout=Layout(
            {
                "wte": "token_embedding",
                "wpe": "position_embedding",
                "ln_f": "final_norm",
                "lm_head": "head",
                **_GPT2_BLOCK,
            },
            transposed=True,
            optional_prefix="transformer.",
            ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),
        ),
        gguf_keys={**_GGUF_KEYS, "norm_epsilon": "attention.layer_norm_epsilon"},
        gguf_layout=Layout(
            {**_GGUF_MODULES, "blk.{}.attn_qkv": "attention.query attention.key attention.value"}
        ),
    ),
    "llama": FamilyFormat(
        model_type="llama",
        architecture="LlamaForCausalLM",
        keys=_LLAMA_KEYS,
        defaults={
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        layout=Layout(_LLAMA_MODULES, ignored=("model.*rotary_emb.inv_freq",)),
        gguf_keys={
            **_GGUF_KEYS,
            "n_kv_heads": "attention.head_count_kv",
            "norm_epsilon": "attention.layer_norm_rms_epsilon",
            "rope_theta": "rope.freq_base",
            "rope_original_context": "rope.scaling.original_context_length",
        },
        gguf_layout=Layout(
            {
                **_GGUF_MODULES,
                "blk.{}.attn_q": "attention.query",
                "blk.{}.attn_k": "attention.key",
                "blk.{}.attn_v": "attention.value",
                "blk.{}.ffn_gate": "feed_forward.gate",
            },
            interleaved=True,
            ignored=("rope_freqs.weight",),
        ),
    ),
}

# Fields that may have any value: sizes, and what matters only in training.
_FREE_FIELDS = frozenset(
    """
    family preset n_layers n_heads n_kv_heads d_model d_ff context_length dropout norm_epsilon
    rope_theta rope_factor rope_original_context rope_low_factor rope_high_factor initialization
    attention_dropout
    """.split()
)


def is_native(config: ModelConfig) -> bool:
    """Whether transformers has a class of its own for exactly this architecture."""
    if config.family not in FORMATS:
        return False
    keys = FORMATS[config.family].keys
    values, family_values = asdict(config), asdict(ModelConfig(**FAMILIES[config.family]))
    fixed_fields = values.keys() - _FREE_FIELDS - keys.keys()
    return (
        all(values[name] == family_values[name] for name in fixed_fields)
        and ("d_ff" in keys or config.feed_forward_width == 4 * config.d_model)
        and ("n_kv_heads" in keys or config.kv_heads == config.n_heads)
    )


def hf_layout(config: ModelConfig) -> Layout:
    """The tensor names of a Hugging Face directory with this model: for modeling_pretrain.py our
    own names."""
    return FORMATS[config.family].layout if is_native(config) else Layout(own_prefix="model.")


def checked_config(values: Mapping[str, Any]) -> ModelConfig:
    """The config of a model from the values in a file. FormatError that lists all wrong ones."""
    unknown = values.keys() - {each.name for each in fields(ModelConfig)}
    if unknown:
        raise FormatError(
            f"fields of the model must be those of this version of pretrain (got "
            f"{', '.join(sorted(unknown)):.200})"
        )
    config, errors = build_config(ModelConfig, values, "model")
    if values.get("context_length") is None:
        errors.append(("context_length", "model.context_length is empty; it must be a number"))
    if errors:
        raise FormatError(str(ConfigError(errors)))
    return config  # type: ignore[no-any-return]
