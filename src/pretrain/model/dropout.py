"""Dropout whose masks are a pure function of seed, sample, layer, place in the layer and element.

They are the same on every device, for every split of the rows over micro-batches and processes, and
when a block is computed again by activation checkpointing. The random numbers are `rng.philox`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from pretrain.rng import philox, philox_key

# Where in a layer a mask is used: part of its key.
ATTENTION_DROPOUT_ID = 0
ATTENTION_OUTPUT_DROPOUT_ID = 1
FEED_FORWARD_DROPOUT_ID = 2
EMBEDDING_DROPOUT_ID = 3
TABLE_DROPOUT_ID = 4


@dataclass(frozen=True, slots=True)
class DropoutRng:
    """The source of the dropout masks of a micro-batch."""

    seed: int
    samples_B: Tensor
    """global numbers of the rows"""
    # Both are computed here, outside of what torch's compiler traces.
    key: tuple[int, int] = field(init=False)
    operator: Callable[..., Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", philox_key(self.seed, "dropout"))
        object.__setattr__(self, "operator", _mask_operator())

    def mask(self, shape: Sequence[int], p: float, *, layer: int, dropout_id: int) -> Tensor:
        """Return a mask (B, ..., D) of `shape`: 0 with probability p, else 1 / (1 - p)."""
        counter = layer * 16 + dropout_id
        mask: Tensor = self.operator(self.samples_B, self.key, counter, shape, p)
        return mask


def dropout(
    x: Tensor, p: float, dropout_rng: DropoutRng | None, *, layer: int, dropout_id: int
) -> Tensor:
    """Apply dropout (Srivastava et al., 2014) to x (B, ..., D); without an rng, or for p 0, return
    x."""
    if dropout_rng is None or p == 0.0:
        return x
    return x * dropout_rng.mask(x.shape, p, layer=layer, dropout_id=dropout_id).to(x.dtype)


def _mask(
    samples_B: Tensor, key: Sequence[int], counter: int, shape: Sequence[int], p: float
) -> Tensor:
    n_elements = math.prod(shape[1:])
    # Philox gives four 32-bit words for each counter.
    index = torch.arange(math.ceil(n_elements / 4), device=samples_B.device)
    sample_B1 = samples_B[:, None]
    words = philox(
        [index, sample_B1, sample_B1 >> 32, torch.full_like(index, counter)], (key[0], key[1])
    )
    words = [word.expand(shape[0], len(index)) for word in words]
    bits = torch.stack(words, dim=-1).flatten(1)[:, :n_elements]
    is_kept = bits >= int(p * 2**32)
    return is_kept.reshape(tuple(shape)).float() / (1.0 - p)


@cache
def _mask_operator() -> Callable[..., Tensor]:
    """Return `_mask` as an operator that torch's compiler does not trace.

    Compiled, its integers are wrong: products above 63 bits differ on a CPU (torch 2.13), and
    indices have 32 bits on CUDA. A compiled run would have other masks than an eager one.
    """
    operator = torch.library.custom_op("pretrain::dropout_mask", _mask, mutates_args=())
    operator.register_fake(
        lambda samples_B, key, counter, shape, p: samples_B.new_empty(shape, dtype=torch.float32)
    )
    return operator
