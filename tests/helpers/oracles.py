"""Implementations by others (torch, transformers) with the weights of our decoders, as oracles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.export.families import FORMATS, hf_layout, is_native
from pretrain.export.hf import to_hf_config
from pretrain.export.layouts import Layout, stored_tensors, to_stored
from pretrain.model.config import ModelConfig, model_defaults
from pretrain.model.decoder import Decoder, build
from pretrain.rng import normal

V, T = 67, 24
SIZES: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "d_model": 32, "context_length": T}

CASES: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in ("transformer", *FORMATS)},
    "gpt2 of another width": {"family": "gpt2", "d_ff": 40},
    "llama 2 70b": {"family": "llama", "n_kv_heads": 2},
    "llama 3": {"family": "llama", "n_kv_heads": 2, "rope_theta": 5e5},
    "llama 3.1": {"family": "llama", "rope_factor": 4.0, "rope_original_context": 12},
    "llama 3.2": {"family": "llama", "tied_head": True, "norm_epsilon": 1e-3},
}


def config_of(family: str, **changes: Any) -> ModelConfig:
    defaults = model_defaults({"family": family})
    return ModelConfig(**{**defaults, "dropout": 0.0, **SIZES, **changes})


def random_decoder(config: ModelConfig, *, vocab_size: int = V) -> Decoder:
    """A decoder with random values for all parameters, also norms, biases and those that start at
    0."""
    decoder = build(config, vocab_size=vocab_size, seed=1)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            p.add_(0.2 * normal(2, name, 0, p.numel(), device=p.device).view_as(p))
    return decoder


class TorchEncoder(nn.Module):
    """The 2017 decoder without attention to an encoder: torch's encoder layers with a causal mask,
    and embedding, sinusoids and head around them."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.d_model,
                config.n_heads,
                dim_feedforward=config.feed_forward_width,
                dropout=0.0,
                activation="relu",
                layer_norm_eps=config.norm_epsilon,
                batch_first=True,
                norm_first=False,
            )
            for _ in range(config.n_layers)
        )

    def forward(self, ids: Tensor) -> Tensor:
        d = self.config.d_model
        waves = torch.zeros(ids.shape[1], d, dtype=self.embedding.weight.dtype)
        for position in range(ids.shape[1]):
            for i in range(0, d, 2):
                angle = position / 10_000 ** (i / d)
                waves[position, i], waves[position, i + 1] = math.sin(angle), math.cos(angle)
        x = self.embedding(ids) * math.sqrt(d) + waves
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        logits: Tensor = x @ self.embedding.weight.T
        return logits


# Attention projections have biases in torch and not in the paper: they stay 0.
TORCH = Layout(
    {
        "embedding": "token_embedding",
        "layers.{}.self_attn.in_proj_": "attention.query attention.key attention.value",
        "layers.{}.self_attn.out_proj": "attention.output",
        "layers.{}.linear1": "feed_forward.up",
        "layers.{}.linear2": "feed_forward.down",
        "layers.{}.norm1": "attention_norm",
        "layers.{}.norm2": "feed_forward_norm",
    },
)


class Oracle:
    """Another implementation with the weights of a decoder."""

    def __init__(self, decoder: Decoder) -> None:
        config, vocab_size = decoder.config, decoder.vocab_size
        self.model: Any
        if config.family == "transformer":
            layout = TORCH
            self.model = TorchEncoder(config, vocab_size)
            for name, p in self.model.named_parameters():
                if name.endswith(("in_proj_bias", "out_proj.bias")):
                    nn.init.zeros_(p)
        else:
            from transformers import AutoConfig, AutoModelForCausalLM

            assert is_native(config)
            layout = hf_layout(config)
            described = {**to_hf_config(config), "vocab_size": vocab_size}
            kind = described.pop("model_type")
            quiet = {"bos_token_id": 0, "eos_token_id": None}
            self.model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(kind, **described, **quiet)
            )
        self.model.to(next(decoder.parameters()).dtype).eval()
        own = dict(decoder.named_parameters())
        self.stored = stored_tensors(config, layout, vocab_size=vocab_size)
        with torch.no_grad():
            for stored in self.stored:
                self.parameter(stored.name).copy_(to_stored(stored, own))

    def parameter(self, name: str) -> nn.Parameter:
        name = name.replace("proj_.weight", "proj_weight")
        names: dict[str, nn.Parameter] = dict(self.model.named_parameters(remove_duplicate=False))
        # GPT-2 is published without the prefix that its class has.
        return names[name] if name in names else names[f"transformer.{name}"]

    def logits(self, ids: Tensor) -> Tensor:
        output = self.model(ids)
        logits: Tensor = getattr(output, "logits", output)
        return logits

    def gradients(self, own: Mapping[str, Tensor]) -> list[tuple[str, Tensor | None, Tensor]]:
        """Return name, the oracle's gradient, and our gradient in its layout."""
        return [(s.name, self.parameter(s.name).grad, to_stored(s, own)) for s in self.stored]
