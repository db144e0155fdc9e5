"""The parts of a block: norms, attention, feed-forward, the cache of keys and values, and the
position encodings.

Hidden states (B, T, D) come in and go out, on one device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.model.config import ModelConfig
from pretrain.model.dropout import (
    ATTENTION_DROPOUT_ID,
    ATTENTION_OUTPUT_DROPOUT_ID,
    FEED_FORWARD_DROPOUT_ID,
    DropoutRng,
    dropout,
)
from pretrain.model.families import IS_GATED
from pretrain.model.fused import (
    apply_rope,
    causal_attention,
    linear,
    prefers_causal_attention,
    rms_norm,
    squared_relu,
)

# Cosine and sine (T, E) of the rotary angles.
Rope = tuple[Tensor, Tensor]
# The weight (F, D) and the bias (F) of layers with the same input, concatenated.
PackedWeights = tuple[Tensor, Tensor | None]


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Do nothing: `build` initialises all weights.

        nn.Embedding's own initialisation on the meta device imports torch's compiler (1.5 s).
        """


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Do nothing, as in `Embedding`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def concat_weights(x: Tensor, *layers: nn.Linear | None) -> PackedWeights | None:
    """Concatenate the weights of layers that read the same x, for one matmul.

    Returns None where one matmul is not faster, and for a single layer or sharded weights.
    """
    linears = [layer for layer in layers if layer is not None]
    is_sharded = any(type(layer.weight) is not nn.Parameter for layer in linears)
    if len(linears) < 2 or is_sharded or not _prefers_one_matmul(x):
        return None
    weights: list[Tensor] = [layer.weight for layer in linears]
    biases: list[Tensor] = [layer.bias for layer in linears if layer.bias is not None]
    return torch.cat(weights), torch.cat(biases) if biases else None


def _prefers_one_matmul(x: Tensor) -> bool:
    # In training on a GPU; the compiler concatenates again in the backward pass, keeping no copy.
    return x.is_cuda and torch.is_grad_enabled() and torch.compiler.is_compiling()


def build_norm(config: ModelConfig) -> nn.Module:
    match config.norm:
        case "layer":
            has_bias = config.has_bias("norm")
            return LayerNorm(config.d_model, eps=config.norm_epsilon, bias=has_bias)
        case "rms":
            return RMSNorm(config.d_model, eps=config.norm_epsilon)
        case _:
            assert_never(config.norm)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight = _upcast(self.weight, x)
        bias = None if self.bias is None else _upcast(self.bias, x)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, _upcast(self.weight, x), self.eps)


def _upcast(weight_D: Tensor, x: Tensor) -> Tensor:
    """Convert a weight to x's dtype if that is wider: FSDP unshards weights in bfloat16."""
    return weight_D.to(torch.promote_types(weight_D.dtype, x.dtype))


@dataclass
class KeyValueCache:
    """Keys and values (B, K, S, E) of each layer at the positions so far, and their ids (B, S)."""

    ids_BS: Tensor | None = None
    # Buffers are twice as long as needed, so that most new positions are written without a copy.
    _buffers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _lengths: dict[int, int] = field(default_factory=dict)
    _parts: dict[int, KeyValueCache] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """The number of positions S."""
        return self._parts[0].length if self._parts else next(iter(self._lengths.values()), 0)

    def of_part(self, index: int) -> KeyValueCache:
        """Return the cache of one of the decoders of a mixture."""
        return self._parts.setdefault(index, KeyValueCache())

    def append_ids(self, ids_BT: Tensor) -> Tensor:
        """Append the ids of new positions; returns the ids before them (B, S)."""
        previous_BS = ids_BT[:, :0] if self.ids_BS is None else self.ids_BS
        self.ids_BS = torch.cat([previous_BS, ids_BT], dim=1)
        return previous_BS

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values (B, K, T, E); returns all of them (B, K, S, E)."""
        start = self._lengths.get(layer, 0)
        stop = start + key.shape[2]
        self._lengths[layer] = stop

        old = self._buffers.get(layer, ())
        if not old or old[0].shape[2] < stop:
            B, K, _, E = key.shape
            buffers = key.new_empty(B, K, 2 * stop, E), value.new_empty(B, K, 2 * stop, E)
            for buffer, old_buffer in zip(buffers, old, strict=False):
                buffer[:, :, :start] = old_buffer[:, :, :start]
            self._buffers[layer] = buffers

        keys, values = self._buffers[layer]
        keys[:, :, start:stop] = key
        values[:, :, start:stop] = value
        return keys[:, :, :stop], values[:, :, :stop]


class Attention(nn.Module):
    """Causal multi-head attention, with fewer key/value heads for grouped queries.

    "Attention Is All You Need" (Vaswani et al., 2017); grouped queries: "GQA" (Ainslie et al.,
    2023); norm of queries and keys: "Query-Key Normalization" (Henry et al., 2020).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        d, d_kv = config.d_model, config.kv_heads * config.d_head
        has_bias = config.has_bias("query_key_value")
        self.query = Linear(d, d, bias=has_bias)
        self.key = Linear(d, d_kv, bias=has_bias)
        self.value = Linear(d, d_kv, bias=has_bias)
        self.output = Linear(d, d, bias=config.has_bias("output"))
        # Query, key and value in one piece of memory; set by generate.pack_weights.
        self.packed: PackedWeights | None = None

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope | None,
        cache: KeyValueCache | None,
        dropout_rng: DropoutRng | None,
    ) -> Tensor:
        packed = self.packed or concat_weights(x_BTD, self.query, self.key, self.value)
        if packed is None:
            query = self._norm_and_rope(self._split_heads(self.query(x_BTD)), rope)
            key = self._norm_and_rope(self._split_heads(self.key(x_BTD)), rope)
            value = self._split_heads(self.value(x_BTD))
        else:
            H, K = self.config.n_heads, self.config.kv_heads
            qkv = self._split_heads(linear(x_BTD, *packed))
            query_key, value = torch.split(qkv, [H + K, K], dim=1)
            query, key = torch.split(self._norm_and_rope(query_key, rope), [H, K], dim=1)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)

        p = self.config.dropout if self.config.attention_dropout else 0.0
        if dropout_rng is not None and p > 0.0:
            shape = (*query.shape[:3], key.shape[2])
            mask = dropout_rng.mask(shape, p, layer=self.layer, dropout_id=ATTENTION_DROPOUT_ID)
            y_BHTE = reference_attention(query, key, value, mask)
        else:
            y_BHTE = attention(query, key, value)
        return self.output(y_BHTE.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split_heads(self, x_BTD: Tensor) -> Tensor:
        return torch.unflatten(x_BTD, -1, (-1, self.config.d_head)).transpose(1, 2)

    def _norm_and_rope(self, x_BHTE: Tensor, rope: Rope | None) -> Tensor:
        if self.config.query_key_norm:
            x_BHTE = rms_norm(x_BHTE, None, None)
        return x_BHTE if rope is None else apply_rope(x_BHTE, *rope)


def attention(query_BHTE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor) -> Tensor:
    """Compute causal attention (B, H, T, E) by torch's kernels; queries are at the last T of S
    positions."""
    T, S = query_BHTE.shape[2], key_BKSE.shape[2]
    if T == S and prefers_causal_attention(query_BHTE):
        n = query_BHTE.shape[1] // key_BKSE.shape[1]
        expanded = (each[:, :, None].expand(-1, -1, n, -1, -1) for each in (key_BKSE, value_BKSE))
        return causal_attention(query_BHTE, *(each.flatten(1, 2) for each in expanded))
    # A single new query attends to every key, so it needs no mask.
    needs_mask = 1 < T < S
    return F.scaled_dot_product_attention(
        query_BHTE,
        key_BKSE,
        value_BKSE,
        attn_mask=causal_mask(T, S, query_BHTE.device) if needs_mask else None,
        is_causal=T == S and T > 1,
        enable_gqa=key_BKSE.shape[1] != query_BHTE.shape[1],
    )


def reference_attention(
    query_BHTE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, dropout_mask_BHTS: Tensor
) -> Tensor:
    """Compute the same step by step, with dropout on the attention weights.

    torch's kernels draw masks of their own, which depend on the batch and the device.
    """
    T, S, d_head = query_BHTE.shape[2], key_BKSE.shape[2], query_BHTE.shape[3]
    heads_per_key = query_BHTE.shape[1] // key_BKSE.shape[1]
    key_BHSE = key_BKSE.repeat_interleave(heads_per_key, 1)
    value_BHSE = value_BKSE.repeat_interleave(heads_per_key, 1)

    scores_BHTS = query_BHTE @ key_BHSE.transpose(2, 3) / math.sqrt(d_head)
    mask_TS = causal_mask(T, S, query_BHTE.device)
    weights_BHTS = scores_BHTS.masked_fill(~mask_TS, float("-inf")).softmax(-1)
    return (weights_BHTS * dropout_mask_BHTS.to(weights_BHTS.dtype)) @ value_BHSE


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Return a mask (queries, keys), True where a query attends to a key.

    Queries are at the last `n_queries` of `n_keys` positions, each attends up to its own.
    """
    ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return ones.tril(n_keys - n_queries)


class FeedForward(nn.Module):
    """ReLU (Vaswani et al., 2017), GELU in its tanh form (Hendrycks and Gimpel, 2016), squared ReLU
    (So et al., 2021), also leaky, or SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f, has_bias = config.d_model, config.feed_forward_width, config.has_bias("feed_forward")
        self.kind = config.feed_forward
        self.gate = Linear(d, f, bias=has_bias) if IS_GATED[self.kind] else None
        self.up = Linear(d, f, bias=has_bias)
        self.down = Linear(f, d, bias=has_bias)
        # Gate and up in one piece of memory; set by generate.pack_weights.
        self.packed: PackedWeights | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        packed = self.packed or concat_weights(x_BTD, self.gate, self.up)
        if packed is None:
            up_BTF = self.up(x_BTD)
            gate_BTF = None if self.gate is None else self.gate(x_BTD)
        else:
            gate_BTF, up_BTF = linear(x_BTD, *packed).chunk(2, dim=-1)

        match self.kind:
            case "swiglu":
                assert gate_BTF is not None
                hidden_BTF = F.silu(gate_BTF) * up_BTF
            case "gelu":
                hidden_BTF = F.gelu(up_BTF, approximate="tanh")
            case "relu":
                hidden_BTF = F.relu(up_BTF)
            case "relu2":
                hidden_BTF = squared_relu(up_BTF)
            case "leaky_relu2":
                hidden_BTF = squared_relu(up_BTF, leak=0.5)
            case _:
                assert_never(self.kind)
        return self.down(hidden_BTF)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each with a residual connection.

    Pre-norm, x + branch(norm(x)), as in GPT-2 and Llama, or post-norm, norm(x + branch(x)), as in
    the transformer of 2017 and GPT.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope | None,
        cache: KeyValueCache | None,
        dropout_rng: DropoutRng | None,
    ) -> Tensor:
        def drop(branch_BTD: Tensor, dropout_id: int) -> Tensor:
            p = self.config.dropout
            return dropout(branch_BTD, p, dropout_rng, layer=self.layer, dropout_id=dropout_id)

        match self.config.norm_place:
            case "before":
                branch = self.attention(self.attention_norm(x_BTD), rope, cache, dropout_rng)
                x_BTD = x_BTD + drop(branch, ATTENTION_OUTPUT_DROPOUT_ID)
                branch = self.feed_forward(self.feed_forward_norm(x_BTD))
                return x_BTD + drop(branch, FEED_FORWARD_DROPOUT_ID)
            case "after":
                branch = self.attention(x_BTD, rope, cache, dropout_rng)
                x_BTD = self.attention_norm(x_BTD + drop(branch, ATTENTION_OUTPUT_DROPOUT_ID))
                branch = self.feed_forward(x_BTD)
                x_BTD = self.feed_forward_norm(x_BTD + drop(branch, FEED_FORWARD_DROPOUT_ID))
                return x_BTD
            case _:
                assert_never(self.config.norm_place)


# Position encodings: pure functions of the position ----------------------------------------------


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
