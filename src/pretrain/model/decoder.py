"""The decoder: ids in, hidden states out, and logits where somebody asks for them.

One class is the decoder of 2017, GPT, GPT-2, Llama and `fast` by its config. It is pure and lives
on one device: loss, optimizer, sampling and parallelism are other people's rooms. It refuses ids
that are not (B, T) and windows beyond its context length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain.compat import allocate_empty
from pretrain.model.config import ModelConfig
from pretrain.model.fused import rms_norm
from pretrain.model.layers import (
    EMBEDDING_DROPOUT_ID,
    Block,
    Embedding,
    KeyValueCache,
    Linear,
    build_norm,
    drop,
)
from pretrain.model.ngrams import NgramEmbedding
from pretrain.model.random import DropoutRng
from pretrain.model.rope import rope_cos_sin, sinusoids_at
from pretrain.rng import normal, uniform

# GPT-2's code draws every matrix from N(0, 0.02).
INITIAL_STD = 0.02


class Decoder(nn.Module):
    """A stack of causal blocks between a token embedding and an output head."""

    def __init__(self, config: ModelConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.token_embedding = Embedding(vocab_size, config.d_model)
        self.position_embedding = (
            Embedding(config.window_tokens, config.d_model)
            if config.position == "learned"
            else None
        )
        self.ngrams = NgramEmbedding(config, vocab_size) if config.table_rows(vocab_size) else None
        # Keyed by number, so that a name stays what it is when a pipeline keeps only some blocks.
        self.blocks = nn.ModuleDict({str(i): Block(config, i) for i in range(config.n_layers)})
        # After a norm at the end of each block there is nothing left to normalise.
        self.final_norm = build_norm(config) if config.norm_place == "before" else None
        self.head = None if config.tied_head else Linear(config.d_model, vocab_size, bias=False)

    def forward(
        self,
        ids_BT: Tensor,
        *,
        cache: KeyValueCache | None = None,
        dropout_rng: DropoutRng | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the final norm.

        With a `cache` the ids continue those in it. Dropout is applied if there is a `dropout_rng`.
        """
        assert ids_BT.ndim == 2, "ids are (rows, time)"
        start = 0 if cache is None else cache.length
        stop = start + ids_BT.shape[1]
        if stop > self.config.window_tokens:
            raise ValueError(f"{stop} ids do not fit the context of {self.config.window_tokens}")
        positions_T = torch.arange(start, stop, device=ids_BT.device)
        x_BTD = self.embed(ids_BT, positions_T, cache, dropout_rng)
        turns = self.config.position == "rotary"
        rotation = rope_cos_sin(positions_T, self.config) if turns else None
        for block in self.blocks.values():
            x_BTD = block(x_BTD, rotation, cache, dropout_rng)
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)

    def embed(
        self,
        ids_BT: Tensor,
        positions_T: Tensor,
        cache: KeyValueCache | None,
        dropout_rng: DropoutRng | None,
    ) -> Tensor:
        """What the first block reads (B, T, D)."""
        x_BTD = self.token_embedding(ids_BT)
        if self.config.scaled_embedding:
            x_BTD = x_BTD * math.sqrt(self.config.d_model)
        if self.ngrams is not None:
            before_BP = ids_BT[:, :0] if cache is None else cache.append_ids(ids_BT)
            x_BTD = x_BTD + self.ngrams(ids_BT, before_BP)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions_T)
        if self.config.position == "sinusoidal":
            x_BTD = x_BTD + sinusoids_at(positions_T, self.config.d_model).to(x_BTD.dtype)
        if self.config.embedding_norm:
            x_BTD = rms_norm(x_BTD, None, None)
        return drop(
            x_BTD, self.config.dropout, dropout_rng, layer=0, dropout_id=EMBEDDING_DROPOUT_ID
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V, D) that turns hidden states into logits."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Unnormalised log-probabilities (..., V) of the next token, for generation and for
        tests."""
        return hidden @ self.head_weight.T


def initial_value(
    config: ModelConfig,
    name: str,
    shape: Sequence[int],
    start: int,
    stop: int,
    *,
    seed: int,
    device: torch.device,
) -> Tensor:
    """Elements [start, stop) of a parameter of `shape` at the start of training, a pure function of
    seed and name.

    Biases and n-gram tables are 0, norm weights 1. Matrices are N(0, 0.02); those that write to the
    residual stream are divided by sqrt(2 n_layers) (`scaled`, as the GPT-2 paper says) or 0
    (`zero`). For `xavier` they are uniform in +-sqrt(6 / (fan in + fan out)) ("Understanding the
    difficulty of training deep feedforward neural networks", Glorot and Bengio, 2010), and
    embeddings N(0, 1 / d_model).
    """
    if name.endswith("bias") or name.startswith("ngrams."):
        return torch.zeros(stop - start, device=device)
    if "norm" in name:
        return torch.ones(stop - start, device=device)
    if config.initialization == "xavier" and "embedding" not in name:
        index = torch.arange(start, stop, device=device)
        u = uniform(seed, name, index).float().to(device)
        return (2 * u - 1) * math.sqrt(6 / sum(shape))
    std = INITIAL_STD if config.initialization != "xavier" else config.d_model**-0.5
    if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
        if config.initialization == "zero":
            return torch.zeros(stop - start, device=device)
        if config.initialization == "scaled":
            std /= math.sqrt(2 * config.n_layers)
    return normal(seed, name, start, stop, device=device) * std


def build(
    config: ModelConfig, *, vocab_size: int, seed: int | None, device: torch.device | str = "cpu"
) -> Decoder:
    """A decoder on `device`, with its initial weights, or with empty ones (to be loaded) for seed
    None."""
    device = torch.device(device)
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size=vocab_size)
    allocate_empty(decoder, device)
    if decoder.ngrams is not None:
        # A dense gradient costs a pass over whole tables, which only a GPU does not notice.
        decoder.ngrams.sparse_gradients = device.type == "cpu"
    if seed is not None:
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                shape, size = parameter.shape, parameter.numel()
                values = initial_value(config, name, shape, 0, size, seed=seed, device=device)
                parameter.copy_(values.view_as(parameter))
    return decoder
