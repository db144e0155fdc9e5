"""The axes of the architecture, the families with their choices, and the published sizes.

To add a family: add it to `Family`, and its choices with their source to FAMILIES, and test it
against an implementation by somebody else (docs/internals/model.md does so with Qwen 2). A choice
that no family has made yet is a new value of an axis: add it to the axis, and mypy names every
`match` that has to handle it; the tables here need it too.
"""

from __future__ import annotations

from typing import Any, Literal

Family = Literal["transformer", "gpt", "gpt2", "llama", "fast"]
Norm = Literal["layer", "rms"]
NormPlace = Literal["before", "after"]
Position = Literal["learned", "sinusoidal", "rotary"]
FeedForwardKind = Literal["gelu", "relu", "relu2", "leaky_relu2", "swiglu"]
Bias = Literal["none", "all", "feed_forward", "query_key_value"]
Initialization = Literal["normal", "scaled", "xavier", "zero"]

HAS_FINAL_NORM: dict[NormPlace, bool] = {"before": True, "after": False}
"""Whether the last hidden states need one more norm before the head."""
IS_GATED: dict[FeedForwardKind, bool] = {
    "gelu": False,
    "relu": False,
    "relu2": False,
    "leaky_relu2": False,
    "swiglu": True,
}
"""Whether a feed-forward layer has a third matrix, the gate."""

# The values of a ModelConfig; those that a family does not name are the config's defaults.
Values = dict[str, Any]


def sizes_of(size: int) -> Values:
    """All sizes of `fast` from its number of layers: one more head than layers, each 64 wide, since
    on a CPU small models are better wide than deep (docs/notebook)."""
    return {"n_layers": size, "n_heads": size + 1, "d_model": 64 * (size + 1)}


FAMILIES: dict[str, Values] = {
    # The decoder of "Attention Is All You Need" (Vaswani et al., 2017), without attention to an
    # encoder. Sections 3.1 to 3.5 and 5.4: post-norm, ReLU, sinusoids, embeddings times
    # sqrt(d_model) and tied to the head, dropout on the sums of embeddings and positions and on the
    # output of each branch, not on attention weights; attention projections without biases. Initial
    # weights are those of the authors' code (tensor2tensor).
    "transformer": {
        "family": "transformer",
        "norm": "layer",
        "norm_place": "after",
        "position": "sinusoidal",
        "feed_forward": "relu",
        "scaled_embedding": True,
        "bias": "feed_forward",
        "tied_head": True,
        "initialization": "xavier",
        "dropout": 0.1,
        "attention_dropout": False,
    },
    # "Improving Language Understanding by Generative Pre-Training" (Radford et al., 2018), section
    # 4.1: post-norm, learned positions, GELU, N(0, 0.02), dropout of 0.1 on embeddings, attention
    # weights and branches.
    "gpt": {
        "family": "gpt",
        "norm": "layer",
        "norm_place": "after",
        "position": "learned",
        "feed_forward": "gelu",
        "bias": "all",
        "tied_head": True,
        "dropout": 0.1,
    },
    # "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2.3:
    # pre-norm, initial weights of residual branches divided by the root of their number. The paper
    # does not mention dropout; it is 0.
    "gpt2": {
        "family": "gpt2",
        "norm": "layer",
        "position": "learned",
        "feed_forward": "gelu",
        "bias": "all",
        "tied_head": True,
        "initialization": "scaled",
    },
    # "LLaMA: Open and Efficient Foundation Language Models" (Touvron et al., 2023), section 2.2:
    # pre-norm with RMSNorm, SwiGLU, rotary positions. Initial weights are not published; they are
    # N(0, 0.02), as in transformers.
    "llama": {
        "family": "llama",
        "norm": "rms",
        "position": "rotary",
        "feed_forward": "swiglu",
        "bias": "none",
        "tied_head": False,
    },
    # This project's own family: the choices that train fastest on little hardware. Leaky squared
    # ReLU: after "Primer" (So et al., 2021); norm of the embedding: "8-bit Optimizers via
    # Block-wise Quantization" (Dettmers et al., 2022); norms of queries and keys: "Query-Key
    # Normalization for Transformers" (Henry et al., 2020); residual branches of 0 at the start:
    # "Fixup Initialization" (Zhang et al., 2019); n-gram and induction embeddings: `ngrams`.
    "fast": {
        "family": "fast",
        "size": 2,
        **sizes_of(2),
        "norm": "rms",
        "norm_epsilon": 1e-6,
        "position": "rotary",
        "feed_forward": "leaky_relu2",
        "embedding_norm": True,
        "query_key_norm": True,
        "ngram_rows": None,
        "induction": 2,
        "bias": "none",
        "tied_head": False,
        "initialization": "zero",
    },
}


def _sized(family: str, n_layers: int, n_heads: int, d_model: int, **rest: Any) -> Values:
    sizes = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model}
    return {"family": family, **sizes, **rest}


def _llama3(n_layers: int, n_heads: int, d_model: int, d_ff: int, **rest: Any) -> Values:
    grouped = {"n_kv_heads": 8, "context_length": 8192, "rope_theta": 500_000.0}
    return _sized("llama", n_layers, n_heads, d_model, **{"d_ff": d_ff, **grouped, **rest})


# Llama 3.1 scaled the context from 8,192 to 131,072 positions, 3.2 with a larger factor.
_LONG = {"context_length": 131_072, "rope_factor": 8.0}
_LONG_AND_TIED = {"context_length": 131_072, "rope_factor": 32.0, "tied_head": True}

# Published sizes: table 3 of "Attention Is All You Need" (2017); section 4.1 of the GPT paper
# (2018); table 2 of the GPT-2 paper (2019); table 2 of LLaMA (2023); table 1 and appendix of
# "Llama 2" (2023); table 3 of "The Llama 3 Herd of Models" (2024); feed-forward widths, norm
# epsilons and all of 3.2 from the published params.json. The vocabulary is the tokenizer's.
PRESETS: dict[str, Values] = {
    "transformer-base": _sized("transformer", 6, 8, 512),
    "transformer-big": _sized("transformer", 6, 16, 1024, dropout=0.3),
    "gpt": _sized("gpt", 12, 12, 768, context_length=512),
    "gpt2-124m": _sized("gpt2", 12, 12, 768, context_length=1024),
    "gpt2-355m": _sized("gpt2", 24, 16, 1024, context_length=1024),
    "gpt2-774m": _sized("gpt2", 36, 20, 1280, context_length=1024),
    "gpt2-1558m": _sized("gpt2", 48, 25, 1600, context_length=1024),
    "llama-7b": _sized("llama", 32, 32, 4096, d_ff=11008, context_length=2048, norm_epsilon=1e-6),
    "llama-13b": _sized("llama", 40, 40, 5120, d_ff=13824, context_length=2048, norm_epsilon=1e-6),
    "llama-33b": _sized("llama", 60, 52, 6656, d_ff=17920, context_length=2048, norm_epsilon=1e-6),
    "llama-65b": _sized("llama", 80, 64, 8192, d_ff=22016, context_length=2048),
    "llama2-7b": _sized("llama", 32, 32, 4096, d_ff=11008, context_length=4096),
    "llama2-13b": _sized("llama", 40, 40, 5120, d_ff=13824, context_length=4096),
    "llama2-70b": _sized("llama", 80, 64, 8192, d_ff=28672, n_kv_heads=8, context_length=4096),
    "llama3-8b": _llama3(32, 32, 4096, 14336),
    "llama3-70b": _llama3(80, 64, 8192, 28672),
    "llama3.1-8b": _llama3(32, 32, 4096, 14336, **_LONG),
    "llama3.1-70b": _llama3(80, 64, 8192, 28672, **_LONG),
    "llama3.1-405b": _llama3(126, 128, 16384, 53248, **_LONG),
    "llama3.2-1b": _llama3(16, 32, 2048, 8192, **_LONG_AND_TIED),
    "llama3.2-3b": _llama3(28, 24, 3072, 8192, **_LONG_AND_TIED),
}
