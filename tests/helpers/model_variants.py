"""Small models of every architecture, and micro-batches for them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, get_args

import torch

from pretrain.data.batches import MicroBatch
from pretrain.model.config import ModelConfig, model_defaults
from pretrain.model.decoder import Decoder, build
from pretrain.model.families import Family
from pretrain.rng import normal

V, T = 61, 12

VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"family": family, "dropout": 0.0} for family in get_args(Family)},
    "llama-grouped": {"family": "llama", "n_kv_heads": 2},
    "llama-stretched": {"family": "llama", "rope_factor": 4.0, "rope_original_context": 6},
    "llama-with-biases": {"family": "llama", "bias": "query_key_value", "tied_head": True},
    "fast": {"family": "fast", "ngram_rows": 97},
}


def small_config(family: str, **changes: Any) -> ModelConfig:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "context_length": T}
    return ModelConfig(**{**model_defaults({"family": family}), **sizes, **changes})


def random_variant(name: str) -> Decoder:
    """A decoder of a variant; matrices that start at zero have random values instead."""
    decoder = build(small_config(**VARIANTS[name]), vocab_size=V, seed=3)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if p.ndim == 2 and not p.any():
                p.copy_(normal(1, name, 0, p.numel(), device=p.device).view_as(p) * 0.05)
    return decoder


def batch_of(ids: torch.Tensor, first_sample: int = 0) -> MicroBatch:
    samples = torch.arange(first_sample, first_sample + len(ids))
    return MicroBatch(ids[:, :-1], ids[:, 1:], samples)


@lru_cache
def compiler_works() -> bool:
    """Whether torch finds a C++ compiler, and can link what that makes: not in a folder whose name
    has a space."""
    from torch._dynamo.exc import BackendCompilerFailed  # also of what its cache has

    try:
        torch.compile(torch.sin)(torch.ones(2))
    except BackendCompilerFailed:
        return False
    return True
