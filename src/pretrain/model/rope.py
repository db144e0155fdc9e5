"""Position encodings as pure functions of the position: rotary angles and fixed sinusoids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.model.config import ModelConfig


def rope_cos_sin(positions_T: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (T, E) of the rotary angles at some positions.

    "RoFormer: Enhanced Transformer with Rotary Position Embedding" (Su et al., 2021). Pair i of a
    head is its elements i and i + E/2, as in Hugging Face's Llama weights. Angles are computed in
    float32 at each call: it takes microseconds, and a table would be a buffer to shard and save.
    """
    frequencies = rope_frequencies(config, device=positions_T.device)
    angles = positions_T.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rope_frequencies(
    config: ModelConfig, *, scaled: bool = True, device: torch.device | None = None
) -> Tensor:
    """Return the angle (E/2), in radians, by which each pair of a head rotates per position.

    With a `rope_factor` low frequencies are divided by it, so that in a longer context no pair
    rotates further than in the original one, high ones stay, and those between are interpolated:
    Llama 3.1 ("The Llama 3 Herd of Models", Grattafiori et al., 2024, and its published code).
    """
    exponents = torch.arange(0, config.d_head, 2, device=device).float() / config.d_head
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_factor == 1.0 or not scaled:
        return frequencies

    rotations_in_context = config.rope_original_context * frequencies / (2 * math.pi)
    low, high = config.rope_low_factor, config.rope_high_factor
    unscaled_share = ((rotations_in_context - low) / (high - low)).clamp(0, 1)
    return (1 - unscaled_share) * frequencies / config.rope_factor + unscaled_share * frequencies


def sinusoids_at(positions_T: Tensor, d_model: int) -> Tensor:
    """Return sines and cosines (T, D), alternating, of wavelengths from 2 pi to 10,000 times that.

    "Attention Is All You Need" (Vaswani et al., 2017), section 3.5.
    """
    exponents = torch.arange(0, d_model, 2, device=positions_T.device).float() / d_model
    angles = positions_T.float()[:, None] / 10_000**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
