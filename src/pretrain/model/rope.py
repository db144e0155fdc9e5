"""Position encodings as pure functions of the position: rotary angles and fixed sinusoids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.model.config import ModelConfig


def rope_cos_sin(positions_T: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, E) of the rotary angles at some positions.

    "RoFormer: Enhanced Transformer with Rotary Position Embedding" (Su et al., 2021). Pair i of a
    head is its elements i and i + E/2, as in the published Llama weights in Hugging Face's layout.
    Angles are made anew in float32 at each call: it costs microseconds, and a table would be a
    buffer to shard, save and move.
    """
    frequencies = rope_frequencies(config, device=positions_T.device)
    angles = positions_T.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rope_frequencies(
    config: ModelConfig, *, scaled: bool = True, device: torch.device | None = None
) -> Tensor:
    """By how much each pair of a head turns from one position to the next (E/2), in radians.

    With a `rope_factor` the low ones are divided by it, so that in a longer context no pair turns
    further than it did in the original one: Llama 3.1 (Grattafiori et al., "The Llama 3 Herd of
    Models", 2024, and its published code).
    """
    places = torch.arange(0, config.d_head, 2, device=device).float() / config.d_head
    frequencies = 1.0 / config.rope_theta**places
    if config.rope_factor == 1.0 or not scaled:
        return frequencies
    turns = config.rope_original_context * frequencies / (2 * math.pi)
    low, high = config.rope_low_factor, config.rope_high_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / config.rope_factor + kept * frequencies


def sinusoids_at(positions_T: Tensor, d_model: int) -> Tensor:
    """Sines and cosines (T, D) of wavelengths from 2 pi to 10,000 times that, in turn: section 3.5
    of "Attention Is All You Need" (Vaswani et al., 2017)."""
    places = torch.arange(0, d_model, 2, device=positions_T.device).float() / d_model
    angles = positions_T.float()[:, None] / 10_000**places
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
