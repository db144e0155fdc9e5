"""What a decoder is made of: the axes of the architecture, the families that fix them, the presets
that size them.

A family is a function's worth of defaults, a preset adds sizes from a paper, and whatever the user
wrote wins. This file is free of torch, so that a wrong number is refused before two seconds of
imports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["gpt2", "llama", "fast"]
Norm = Literal["layer", "rms"]
Position = Literal["learned", "rotary"]
FeedForwardKind = Literal["gelu", "swiglu", "relu2"]

# GPT-2: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019).
# Llama: "LLaMA: Open and Efficient Foundation Language Models" (Touvron et al., 2023).
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "norm": "layer",
        "norm_epsilon": 1e-5,
        "position": "learned",
        "feed_forward": "gelu",
        "bias": True,
        "tied_head": True,
    },
    "llama": {
        "norm": "rms",
        "norm_epsilon": 1e-5,
        "position": "rotary",
        "feed_forward": "swiglu",
        "bias": False,
        "tied_head": False,
    },
    # The project's own: what trains fastest on little hardware. Squared ReLU: "Primer" (So et al.,
    # 2021); norm of the embedding: "8-bit Optimizers via Block-wise Quantization" (Dettmers et al.,
    # 2022); norms of queries and keys: "Query-Key Normalization for Transformers" (Henry et al.,
    # 2020); residual branches that start at zero: "Fixup Initialization" (Zhang et al., 2019).
    "fast": {
        "norm": "rms",
        "norm_epsilon": 1e-6,
        "position": "rotary",
        "feed_forward": "relu2",
        "embedding_norm": True,
        "query_key_norm": True,
        "zero_branches": True,
        "ngram_rows": 65_536,
        "bias": False,
        "tied_head": False,
    },
}


def _gpt2(n_layers: int, n_heads: int, d_model: int) -> dict[str, Any]:
    sizes = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model}
    return {"family": "gpt2", "context_length": 1024, **sizes}


def _llama(n_layers: int, n_heads: int, d_model: int, d_ff: int, **rest: Any) -> dict[str, Any]:
    sizes = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model, "d_ff": d_ff}
    return {"family": "llama", **sizes, **rest}


# Sizes from table 2 of the GPT-2 paper, table 2 of LLaMA, table 1 of "Llama 2" (2023), table 3 of
# "The Llama 3 Herd of Models" (2024). The vocabulary is the tokenizer's, never the preset's.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-124m": _gpt2(12, 12, 768),
    "gpt2-355m": _gpt2(24, 16, 1024),
    "gpt2-774m": _gpt2(36, 20, 1280),
    "gpt2-1558m": _gpt2(48, 25, 1600),
    "llama-7b": _llama(32, 32, 4096, 11008, context_length=2048, norm_epsilon=1e-6),
    "llama2-7b": _llama(32, 32, 4096, 11008, context_length=4096),
    "llama3-8b": _llama(
        32, 32, 4096, 14336, n_kv_heads=8, context_length=8192, rope_theta=500_000.0
    ),
}


def model_defaults(section: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a `model` section starts from: its family's, then its preset's.

    Raises ValueError for an unknown family or preset, and for a preset of another family.
    """
    preset_name, family = section.get("preset"), section.get("family")
    preset: dict[str, Any] = {}
    if preset_name is not None:
        if preset_name not in PRESETS:
            raise ValueError(f"model.preset {preset_name!r} is not one of {', '.join(PRESETS)}")
        preset = PRESETS[preset_name]
        if family is not None and family != preset["family"]:
            raise ValueError(
                f"model.preset {preset_name} is of the family {preset['family']}, "
                f"but model.family is {family}; name one of the two"
            )
    family = preset.get("family", family or "llama")
    if family not in FAMILIES:
        raise ValueError(f"model.family {family!r} is not one of {', '.join(FAMILIES)}")
    return {"family": family, **FAMILIES[family], **preset}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    family: Family = "llama"
    """the architecture's family: gpt2, llama or fast"""
    preset: str | None = None
    """published sizes by name (gpt2-124m, llama3-8b, ...); your own values win over them"""
    n_layers: int = 4
    """number of blocks"""
    n_heads: int = 4
    """number of attention heads; d_model must be a multiple of it"""
    n_kv_heads: int | None = None
    """number of key/value heads (grouped-query attention); empty: as many as heads"""
    d_model: int = 128
    """width of the residual stream"""
    d_ff: int | None = None
    """width of the feed-forward layer; empty: 4 d_model (gelu, relu2) or 8/3 d_model to the next 32
    (swiglu)"""
    context_length: int | None = None
    """how many ids a prediction may look back on (T); empty: 128, less for a tiny text"""
    dropout: float = 0.0
    """share of activations set to zero in training, on embeddings, attention and residual
    branches"""
    norm: Norm = "rms"
    """kind of normalisation: layer (mean and variance) or rms"""
    norm_epsilon: float = 1e-5
    """added under the square root of a norm"""
    position: Position = "rotary"
    """how position enters: learned (a table added to the embedding) or rotary (queries and keys
    turn)"""
    rope_theta: float = 10_000.0
    """base of the rotary wavelengths"""
    feed_forward: FeedForwardKind = "swiglu"
    """kind of feed-forward layer: gelu or relu2 (two matrices), swiglu (three)"""
    query_key_norm: bool = False
    """whether queries and keys are normalised before they meet"""
    zero_branches: bool = False
    """whether the matrices that write to the residual stream start at zero"""
    embedding_norm: bool = False
    """whether the embedded ids are normalised before the first block"""
    ngram_rows: int = 0
    """rows of each hashed table of bigram and trigram embeddings; 0: none"""
    bias: bool = False
    """whether linear layers and layer norms have biases"""
    tied_head: bool = False
    """whether the output head shares the token embedding's weights"""

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "d_model", "n_kv_heads", "d_ff", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} is {value}; it must be at least 1")
        if self.d_model % self.n_heads:
            raise ValueError(
                f"model.d_model {self.d_model} is not a multiple of model.n_heads {self.n_heads}"
            )
        if self.position == "rotary" and (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"rotary positions need an even head width, but model.d_model {self.d_model} / "
                f"model.n_heads {self.n_heads} is {self.d_model // self.n_heads}"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"model.n_heads {self.n_heads} is not a multiple of "
                f"model.n_kv_heads {self.n_kv_heads}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout is {self.dropout}; it must be in [0, 1)")
        if self.ngram_rows < 0:
            raise ValueError(f"model.ngram_rows is {self.ngram_rows}; it must be 0 or above")
        for name in ("norm_epsilon", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be above 0")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def feed_forward_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        if self.feed_forward != "swiglu":
            return 4 * self.d_model
        # Three matrices of 8/3 d hold what two of 4 d hold (Shazeer, "GLU Variants", 2020).
        return -(-8 * self.d_model // 3 // 32) * 32

    @property
    def window_tokens(self) -> int:
        """The context length T, once it has been decided."""
        assert self.context_length is not None, "context_length is decided before a model is built"
        return self.context_length


def n_parameters(config: ModelConfig, *, vocab_size: int) -> int:
    """Number of parameters, a tied head counted once; arithmetic only, nothing is built."""
    d, f, bias = config.d_model, config.feed_forward_width, int(config.bias)
    d_kv = config.kv_heads * config.d_head
    attention = 2 * d * d + 2 * d * d_kv + bias * (2 * d + 2 * d_kv)
    if config.feed_forward != "swiglu":
        feed_forward = 2 * d * f + bias * (d + f)
    else:
        feed_forward = 3 * d * f + bias * (d + 2 * f)
    norm = d * (1 + bias) if config.norm == "layer" else d
    positions = config.window_tokens * d if config.position == "learned" else 0
    embeddings = vocab_size * d * (1 if config.tied_head else 2) + positions
    embeddings += 2 * config.ngram_rows * d
    return embeddings + config.n_layers * (attention + feed_forward + 2 * norm) + norm
