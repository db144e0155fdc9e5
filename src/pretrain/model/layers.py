"""The parts of a block: norm, attention, feed-forward, and the cache of keys and values.

Hidden states (B, T, D) go in and come out. Nothing here knows of losses, optimizers, files or
processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.model.config import ModelConfig
from pretrain.model.fused import linear, rms_norm, rotate, squared_relu
from pretrain.model.random import DropoutRng

ATTENTION_DROPOUT_ID, ATTENTION_OUTPUT_DROPOUT_ID, FEED_FORWARD_DROPOUT_ID, EMBEDDING_DROPOUT_ID = (
    range(4)
)


def build_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layer":
        return LayerNorm(config.d_model, eps=config.norm_epsilon, bias=config.has_bias("norm"))
    return RMSNorm(config.d_model, eps=config.norm_epsilon)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: `build` gives the values. Torch's own draw, of a tensor without memory, would
        import its compiler, which takes a second and a half."""


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing, as for `Embedding`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def side_by_side(x: Tensor, *layers: nn.Linear | None) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias of layers that read the same x in one, so that they are one product; None
    where that gains nothing, or parts of them lie in other processes."""
    there: list[nn.Linear] = [layer for layer in layers if layer is not None]
    is_whole = all(type(layer.weight) is nn.Parameter for layer in there)
    if len(there) < 2 or not is_whole or not _joins(x):
        return None
    biases: list[Tensor] = [layer.bias for layer in there if layer.bias is not None]
    weight = torch.cat([layer.weight for layer in there])
    return weight, torch.cat(biases) if biases else None


def _joins(x: Tensor) -> bool:
    """Whether one product is faster: on a GPU, in training, by a compiler, which puts the weights
    together once more on the way back rather than keep them."""
    on_gpu = x.device.type == "cuda"
    return on_gpu and torch.is_grad_enabled() and torch.compiler.is_compiling()


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else _as_exact(p, x) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, _as_exact(self.weight, x), self.eps)


def _as_exact(weight_D: Tensor, x: Tensor) -> Tensor:
    """A weight as exact as x: one that other processes hold may have come in bfloat16."""
    return weight_D.to(torch.promote_types(weight_D.dtype, x.dtype))


@dataclass
class KeyValueCache:
    """Keys and values of the positions seen so far, a pair of (B, K, S, E) for each layer, and
    their ids."""

    ids_BS: Tensor | None = None
    # With room for more positions than there are: to append one is not to copy all.
    _rooms: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _lengths: dict[int, int] = field(default_factory=dict)

    def append_ids(self, ids_BT: Tensor) -> Tensor:
        """Note ids that are about to be read; returns those before them (B, S)."""
        before_BS = ids_BT[:, :0] if self.ids_BS is None else self.ids_BS
        self.ids_BS = torch.cat([before_BS, ids_BT], dim=1)
        return before_BS

    @property
    def length(self) -> int:
        return next(iter(self._lengths.values()), 0)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append this layer's new keys and values (B, K, T, E); returns all of them (B, K, S,
        E)."""
        start = self._lengths.get(layer, 0)
        stop = self._lengths[layer] = start + key.shape[2]
        if layer not in self._rooms or self._rooms[layer][0].shape[2] < stop:
            B, K, _, E = key.shape
            larger = key.new_empty(B, K, 2 * stop, E), value.new_empty(B, K, 2 * stop, E)
            for old, new in zip(self._rooms.get(layer, ()), larger, strict=False):
                new[:, :, :start] = old[:, :, :start]
            self._rooms[layer] = larger
        keys, values = self._rooms[layer]
        keys[:, :, start:stop] = key
        values[:, :, start:stop] = value
        return keys[:, :, :stop], values[:, :, :stop]


class Attention(nn.Module):
    """Causal multi-head attention, with fewer key/value heads than heads where the config says so.

    "Attention Is All You Need" (Vaswani et al., 2017); "GQA" (Ainslie et al., 2023).
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
        # The weight and bias of query, key and value in one, where they are laid out so.
        self.joint: tuple[Tensor, Tensor | None] | None = None

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache | None,
        dropout_rng: DropoutRng | None,
    ) -> Tensor:
        joint = self.joint or side_by_side(x_BTD, self.query, self.key, self.value)
        if joint is None:
            query, key = self._heads(self.query(x_BTD)), self._heads(self.key(x_BTD))
            value = self._heads(self.value(x_BTD))
            query, key = self._turn(query, rotation), self._turn(key, rotation)
        else:
            H, K = self.config.n_heads, self.config.kv_heads
            both, value = torch.split(self._heads(linear(x_BTD, *joint)), [H + K, K], dim=1)
            query, key = torch.split(self._turn(both, rotation), [H, K], dim=1)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        mixed_BHTE = self._attend(query, key, value, dropout_rng)
        return self.output(mixed_BHTE.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return torch.unflatten(x_BTD, -1, (-1, self.config.d_head)).transpose(1, 2)

    def _turn(self, x_BHTE: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.config.query_key_norm:
            x_BHTE = rms_norm(x_BHTE, None, None)
        return x_BHTE if rotation is None else rotate(x_BHTE, *rotation)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_rng: DropoutRng | None
    ) -> Tensor:
        T, S, grouped = query.shape[2], key.shape[2], key.shape[1] != query.shape[1]
        if dropout_rng is not None and self.config.attention_dropout:
            return self._attend_plainly(query, key, value, dropout_rng)
        if T == S or T == 1:
            # A single new query sees every cached key, so it needs no mask at all.
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=T == S and T > 1, enable_gqa=grouped
            )
        mask_TS = causal_mask(T, S, query.device)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_TS, enable_gqa=grouped
        )

    def _attend_plainly(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_rng: DropoutRng
    ) -> Tensor:
        """Attention written out, for dropout on its weights with a mask that no kernel can draw."""
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores_BHTS = query @ key.transpose(2, 3) / math.sqrt(self.config.d_head)
        mask_TS = causal_mask(query.shape[2], key.shape[2], query.device)
        weights = scores_BHTS.masked_fill(~mask_TS, float("-inf")).softmax(-1)
        rate = self.config.dropout
        keep = dropout_rng.mask(
            weights.shape, rate, layer=self.layer, dropout_id=ATTENTION_DROPOUT_ID
        )
        return (weights * keep.to(weights.dtype)) @ value


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """True where a query may look: the last `n_queries` of `n_keys` positions, each up to
    itself."""
    ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return ones.tril(n_keys - n_queries)


class FeedForward(nn.Module):
    """ReLU (Vaswani et al., 2017), GELU in its tanh form (Hendrycks and Gimpel, 2016), squared ReLU
    (So et al., 2021), or SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f, has_bias = config.d_model, config.feed_forward_width, config.has_bias("feed_forward")
        self.kind = config.feed_forward
        self.gate = Linear(d, f, bias=has_bias) if self.kind == "swiglu" else None
        self.up = Linear(d, f, bias=has_bias)
        self.down = Linear(f, d, bias=has_bias)
        # Those of gate and up, likewise.
        self.joint: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        joint = self.joint or side_by_side(x_BTD, self.gate, self.up)
        if joint is None:
            up_BTF = self.up(x_BTD)
            gate_BTF = None if self.gate is None else self.gate(x_BTD)
        else:
            gate_BTF, up_BTF = linear(x_BTD, *joint).chunk(2, dim=-1)
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
        return self.down(hidden_BTF)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two branches beside the residual stream: attention, then feed-forward.

    Pre-norm, x + branch(norm(x)), as in GPT-2 and Llama, or post-norm, norm(x + branch(x)), as in
    2017 and GPT.
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
        rotation: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache | None,
        dropout_rng: DropoutRng | None,
    ) -> Tensor:
        if self.config.norm_place == "after":
            branch = self.attention(x_BTD, rotation, cache, dropout_rng)
            x_BTD = self.attention_norm(
                x_BTD + self._drop(branch, dropout_rng, ATTENTION_OUTPUT_DROPOUT_ID)
            )
            branch = self.feed_forward(x_BTD)
            return self.feed_forward_norm(  # type: ignore[no-any-return]
                x_BTD + self._drop(branch, dropout_rng, FEED_FORWARD_DROPOUT_ID)
            )
        branch = self.attention(self.attention_norm(x_BTD), rotation, cache, dropout_rng)
        x_BTD = x_BTD + self._drop(branch, dropout_rng, ATTENTION_OUTPUT_DROPOUT_ID)
        branch = self.feed_forward(self.feed_forward_norm(x_BTD))
        return x_BTD + self._drop(branch, dropout_rng, FEED_FORWARD_DROPOUT_ID)

    def _drop(self, branch_BTD: Tensor, dropout_rng: DropoutRng | None, dropout_id: int) -> Tensor:
        return drop(
            branch_BTD, self.config.dropout, dropout_rng, layer=self.layer, dropout_id=dropout_id
        )


def drop(
    x: Tensor, rate: float, dropout_rng: DropoutRng | None, *, layer: int, dropout_id: int
) -> Tensor:
    """Dropout (Srivastava et al., 2014) from counter-based noise; without noise nothing is
    dropped."""
    if dropout_rng is None:
        return x
    return x * dropout_rng.mask(x.shape, rate, layer=layer, dropout_id=dropout_id).to(x.dtype)
