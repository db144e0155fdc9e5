"""The names that other programs use for our families: one table.

It has the keys and tensor names of each family in transformers and, where llama.cpp has the family,
in GGUF. All code that depends on the family reads this table: a field that a format has no key for
must have the family's own value. To add a family that transformers has, add it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.export.layouts import Layout
from pretrain.model.config import ModelConfig
from pretrain.model.families import FAMILIES


@dataclass(frozen=True, slots=True)
class HfFormat:
    """A family in transformers."""

    model_type: str
    architecture: str
    keys: Mapping[str, str]
    """Field of ModelConfig -> key of config.json."""
    defaults: Mapping[str, Any]
    """The values of transformers for missing keys."""
    fixed: Mapping[str, Any]
    """Keys for which any other value is another architecture."""
    layout: Layout


@dataclass(frozen=True, slots=True)
class GgufFormat:
    """A family in GGUF; the name of its architecture is the family's."""

    keys: Mapping[str, str]
    """Field of ModelConfig -> key, after the name of the architecture."""
    layout: Layout


@dataclass(frozen=True, slots=True)
class FamilyFormats:
    """A family in every format."""

    hf: HfFormat
    gguf: GgufFormat | None = None


_GPT2_BLOCK = {
    "transformer.h.{}.ln_1": "attention_norm",
    "transformer.h.{}.attn.c_attn": "attention.query attention.key attention.value",
    "transformer.h.{}.attn.c_proj": "attention.output",
    "transformer.h.{}.ln_2": "feed_forward_norm",
    "transformer.h.{}.mlp.c_fc": "feed_forward.up",
    "transformer.h.{}.mlp.c_proj": "feed_forward.down",
}
_GGUF_BLOCK = {
    "blk.{}.attn_norm": "attention_norm",
    "blk.{}.attn_output": "attention.output",
    "blk.{}.ffn_norm": "feed_forward_norm",
    "blk.{}.ffn_up": "feed_forward.up",
    "blk.{}.ffn_down": "feed_forward.down",
}
_GGUF_KEYS = {
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "d_model": "embedding_length",
    "d_ff": "feed_forward_length",
    "context_length": "context_length",
}

FORMATS: dict[str, FamilyFormats] = {
    "gpt": FamilyFormats(
        HfFormat(
            model_type="openai-gpt",
            architecture="OpenAIGPTLMHeadModel",
            keys={
                "n_layers": "n_layer",
                "n_heads": "n_head",
                "d_model": "n_embd",
                "context_length": "n_positions",
                "norm_epsilon": "layer_norm_epsilon",
                "dropout": "resid_pdrop",
            },
            defaults={"n_positions": 512, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1},
            fixed={"afn": "gelu", "tie_word_embeddings": True},
            layout=Layout(
                {
                    "transformer.tokens_embed": "token_embedding",
                    "transformer.positions_embed": "position_embedding",
                },
                _GPT2_BLOCK,
                transposed=True,
                prefixes=("transformer.",),
                ignored=("transformer.h.{}.attn.bias", "transformer.position_ids"),
                copies={"lm_head.weight": "transformer.tokens_embed.weight"},
            ),
        )
    ),
    "gpt2": FamilyFormats(
        HfFormat(
            model_type="gpt2",
            architecture="GPT2LMHeadModel",
            keys={
                "n_layers": "n_layer",
                "n_heads": "n_head",
                "d_model": "n_embd",
                "d_ff": "n_inner",
                "context_length": "n_positions",
                "norm_epsilon": "layer_norm_epsilon",
                "dropout": "resid_pdrop",
            },
            defaults={
                "n_positions": 1024,
                "n_inner": None,
                "layer_norm_epsilon": 1e-5,
                "resid_pdrop": 0.1,
            },
            fixed={
                "activation_function": "gelu_new",
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
                "tie_word_embeddings": True,
            },
            layout=Layout(
                {
                    "transformer.wte": "token_embedding",
                    "transformer.wpe": "position_embedding",
                    "transformer.ln_f": "final_norm",
                },
                _GPT2_BLOCK,
                transposed=True,
                prefixes=("transformer.",),
                ignored=("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
                copies={"lm_head.weight": "transformer.wte.weight"},
            ),
        ),
        GgufFormat(
            keys={**_GGUF_KEYS, "norm_epsilon": "attention.layer_norm_epsilon"},
            layout=Layout(
                {
                    "token_embd": "token_embedding",
                    "position_embd": "position_embedding",
                    "output_norm": "final_norm",
                },
                {
                    **_GGUF_BLOCK,
                    "blk.{}.attn_qkv": "attention.query attention.key attention.value",
                },
                copies={"output.weight": "token_embd.weight"},
            ),
        ),
    ),
    "llama": FamilyFormats(
        HfFormat(
            model_type="llama",
            architecture="LlamaForCausalLM",
            keys={
                "n_layers": "num_hidden_layers",
                "n_heads": "num_attention_heads",
                "n_kv_heads": "num_key_value_heads",
                "d_model": "hidden_size",
                "d_ff": "intermediate_size",
                "context_length": "max_position_embeddings",
                "norm_epsilon": "rms_norm_eps",
                "tied_head": "tie_word_embeddings",
            },
            defaults={
                "num_key_value_heads": None,
                "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
            },
            fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
            layout=Layout(
                {
                    "model.embed_tokens": "token_embedding",
                    "model.norm": "final_norm",
                    "lm_head": "head",
                },
                {
                    "model.layers.{}.input_layernorm": "attention_norm",
                    "model.layers.{}.self_attn.q_proj": "attention.query",
                    "model.layers.{}.self_attn.k_proj": "attention.key",
                    "model.layers.{}.self_attn.v_proj": "attention.value",
                    "model.layers.{}.self_attn.o_proj": "attention.output",
                    "model.layers.{}.post_attention_layernorm": "feed_forward_norm",
                    "model.layers.{}.mlp.gate_proj": "feed_forward.gate",
                    "model.layers.{}.mlp.up_proj": "feed_forward.up",
                    "model.layers.{}.mlp.down_proj": "feed_forward.down",
                },
                ignored=(
                    "model.layers.{}.self_attn.rotary_emb.inv_freq",
                    "model.rotary_emb.inv_freq",
                ),
                copies={"lm_head.weight": "model.embed_tokens.weight"},
            ),
        ),
        GgufFormat(
            keys={
                **_GGUF_KEYS,
                "n_kv_heads": "attention.head_count_kv",
                "norm_epsilon": "attention.layer_norm_rms_epsilon",
                "rope_theta": "rope.freq_base",
                "rope_original_context": "rope.scaling.original_context_length",
            },
            layout=Layout(
                {
                    "token_embd": "token_embedding",
                    "output_norm": "final_norm",
                    "output": "head",
                },
                {
                    **_GGUF_BLOCK,
                    "blk.{}.attn_q": "attention.query",
                    "blk.{}.attn_k": "attention.key",
                    "blk.{}.attn_v": "attention.value",
                    "blk.{}.ffn_gate": "feed_forward.gate",
                },
                interleaved=True,
                ignored=("rope_freqs.weight",),
            ),
        ),
    ),
}

# The layout of modeling_pretrain.py, which has our own names: every module of a decoder.
OWN_LAYOUT = Layout(
    {
        f"model.{name}": name
        for name in ["token_embedding", "position_embedding", "final_norm", "head"]
        + [f"ngrams.{table}.{n}" for table in ("parts", "recalled") for n in range(1, 9)]
    },
    {
        f"model.blocks.{{}}.{name}": name
        for name in (
            "attention_norm",
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.output",
            "feed_forward_norm",
            "feed_forward.gate",
            "feed_forward.up",
            "feed_forward.down",
        )
    },
)

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
    keys = FORMATS[config.family].hf.keys
    values, family_values = asdict(config), asdict(ModelConfig(**FAMILIES[config.family]()))
    fixed_fields = values.keys() - _FREE_FIELDS - keys.keys()
    return (
        all(values[name] == family_values[name] for name in fixed_fields)
        and ("d_ff" in keys or config.feed_forward_width == 4 * config.d_model)
        and ("n_kv_heads" in keys or config.kv_heads == config.n_heads)
    )


def hf_layout(config: ModelConfig) -> Layout:
    """The tensor names of a Hugging Face directory with this model."""
    return FORMATS[config.family].hf.layout if is_native(config) else OWN_LAYOUT
