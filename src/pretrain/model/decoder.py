"""The decoder: ids in, hidden states out, and logits on request.

One class is the decoder of the 2017 transformer, GPT, GPT-2, Llama and `fast`, by its config. It is
a pure function on one device; loss, optimizer, sampling and parallelism are other packages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from pretrain.compat import allocate_empty
from pretrain.model.config import ModelConfig
from pretrain.model.dropout import EMBEDDING_DROPOUT_ID, DropoutRng, dropout
from pretrain.model.families import HAS_FINAL_NORM
from pretrain.model.fused import rms_norm
from pretrain.model.layers import (
    Block,
    Embedding,
    KeyValueCache,
    Linear,
    build_norm,
    rope_cos_sin,
    sinusoids_at,
)
from pretrain.model.ngrams import NgramEmbedding
from pretrain.rng import normal, uniform

# GPT-2's code draws every matrix from N(0, 0.02).
INITIAL_STD = 0.02


class Decoder(nn.Module):
    """A stack of causal blocks between a token embedding and an output head."""

    def __init__(self, config: ModelConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.token_embedding = Embedding(vocab_size, config.d_model)
        self.position_embedding = None
        if config.position == "learned":
            self.position_embedding = Embedding(config.window_tokens, config.d_model)
        self.ngrams = NgramEmbedding(config, vocab_size) if config.table_rows(vocab_size) else None
        # A ModuleDict: a block keeps its name in a pipeline stage that has some of the blocks.
        self.blocks = nn.ModuleDict({str(i): Block(config, i) for i in range(config.n_layers)})
        self.final_norm = build_norm(config) if HAS_FINAL_NORM[config.norm_place] else None
        self.head = None if config.tied_head else Linear(config.d_model, vocab_size, bias=False)

    def forward(
        self,
        ids_BT: Tensor,
        *,
        cache: KeyValueCache | None = None,
        dropout_rng: DropoutRng | None = None,
    ) -> Tensor:
        """Compute the last hidden states (B, T, D), after the final norm.

        With a `cache` the ids continue those in it. Dropout is applied if there is a `dropout_rng`.
        Raises ValueError for more ids than the context length.
        """
        assert ids_BT.ndim == 2, "ids must be (B, T)"
        start = 0 if cache is None else cache.length
        stop = start + ids_BT.shape[1]
        if stop > self.config.window_tokens:
            limit = self.config.window_tokens
            raise ValueError(f"{stop} ids do not fit the context: there must be at most {limit}")
        positions_T = torch.arange(start, stop, device=ids_BT.device)
        uses_rope = self.config.position == "rotary"
        rope = rope_cos_sin(positions_T, self.config) if uses_rope else None

        x_BTD = self.embed(ids_BT, positions_T, cache, dropout_rng)
        for block in self.blocks.values():
            x_BTD = block(x_BTD, rope, cache, dropout_rng)
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)

    def embed(
        self,
        ids_BT: Tensor,
        positions_T: Tensor,
        cache: KeyValueCache | None,
        dropout_rng: DropoutRng | None,
    ) -> Tensor:
        """Compute the input of the first block (B, T, D)."""
        x_BTD = self.token_embedding(ids_BT)
        if self.config.scaled_embedding:
            x_BTD = x_BTD * math.sqrt(self.config.d_model)
        if self.ngrams is not None:
            previous_ids_BP = ids_BT[:, :0] if cache is None else cache.append_ids(ids_BT)
            x_BTD = x_BTD + self.ngrams(ids_BT, previous_ids_BP, dropout_rng)

        match self.config.position:
            case "learned":
                assert self.position_embedding is not None
                x_BTD = x_BTD + self.position_embedding(positions_T)
            case "sinusoidal":
                x_BTD = x_BTD + sinusoids_at(positions_T, self.config.d_model).to(x_BTD.dtype)
            case "rotary":
                pass  # applied to queries and keys
            case _:
                assert_never(self.config.position)

        if self.config.embedding_norm:
            x_BTD = rms_norm(x_BTD, None, None)
        p = self.config.dropout
        return dropout(x_BTD, p, dropout_rng, layer=0, dropout_id=EMBEDDING_DROPOUT_ID)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V, D) from hidden states to logits."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (..., V) of the next token from hidden states (..., D).

        For generation and tests; the training loss never has all of them (`loss.py`).
        """
        return hidden @ self.head_weight.T


def initial_rows(
    config: ModelConfig,
    name: str,
    shape: Sequence[int],
    *,
    seed: int,
    device: torch.device,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Return a parameter before training, or its rows [start, stop).

    Each element is a pure function of seed, name and place, so that any shard can be initialised
    alone. Biases and n-gram tables are 0, norm weights 1. Matrices are N(0, 0.02), but those that
    write to the residual stream are divided by sqrt(2 n_layers) for `scaled`, as in the GPT-2
    paper, and 0 for `zero`. For `xavier` matrices are uniform in +-sqrt(6 / (fan in + fan out))
    ("Understanding the difficulty of training deep feedforward neural networks", Glorot and Bengio,
    2010), and embeddings N(0, 1 / d_model).
    """
    first, last = rows or (0, shape[0])
    own_shape = (last - first, *shape[1:])
    start, stop = first * math.prod(shape[1:]), last * math.prod(shape[1:])
    if name.endswith("bias") or name.startswith("ngrams."):
        return torch.zeros(own_shape, device=device)
    if "norm" in name:
        return torch.ones(own_shape, device=device)

    std = INITIAL_STD
    writes_to_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
    match config.initialization:
        case "normal":
            pass
        case "scaled":
            if writes_to_residual:
                std /= math.sqrt(2 * config.n_layers)
        case "zero":
            if writes_to_residual:
                return torch.zeros(own_shape, device=device)
        case "xavier":
            if "embedding" not in name:
                index = torch.arange(start, stop, device=device)
                u = uniform(seed, name, index).float().to(device)
                return ((2 * u - 1) * math.sqrt(6 / sum(shape))).view(own_shape)
            std = config.d_model**-0.5
        case _:
            assert_never(config.initialization)
    return (normal(seed, name, start, stop, device=device) * std).view(own_shape)


def build(
    config: ModelConfig, *, vocab_size: int, seed: int | None, device: torch.device | str = "cpu"
) -> Decoder:
    """Build a decoder with its initial weights on `device`; uninitialised ones for seed None."""
    device = torch.device(device)
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size=vocab_size)
    allocate_empty(decoder, device)
    if decoder.ngrams is not None:
        # Dense gradients are a pass over all tables, which is slow on a CPU and free on a GPU.
        decoder.ngrams.sparse_gradients = device.type == "cpu"
    if seed is not None:
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                shape = parameter.shape
                parameter.copy_(initial_rows(config, name, shape, seed=seed, device=device))
    return decoder
