"""Dropout masks that are a pure function of seed, sample, layer, site and element.

They are the same on every device and for every split of the rows; the numbers are those of
`rng.philox`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from pretrain.rng import philox, philox_key


def _mask(
    samples_B: Tensor, key: Sequence[int], where: int, shape: Sequence[int], rate: float
) -> Tensor:
    place = math.prod(shape[1:])
    blocks = torch.arange(-(-place // 4), device=samples_B.device)
    sample = samples_B[:, None]
    words = philox([blocks, sample, sample >> 32, torch.full_like(blocks, where)], (key[0], key[1]))
    size = (shape[0], blocks.numel())
    bits = torch.stack([w.expand(size) for w in words], dim=-1).flatten(1)[:, :place]
    kept = bits >= int(rate * 2**32)
    return kept.reshape(tuple(shape)).float() / (1.0 - rate)


@cache
def _mask_operation() -> Callable[..., Tensor]:
    """`_mask` as one operation, which torch's compiler may not look into: in what it makes of these
    integers, products above 63 bits come out otherwise (torch 2.13 on a CPU), and indices are cut
    to 32 bits (on CUDA). A compiled run would have other masks than an eager one."""
    operation = torch.library.custom_op("pretrain::dropout_mask", _mask, mutates_args=())

    def shaped(
        samples_B: Tensor, key: Sequence[int], where: int, shape: Sequence[int], rate: float
    ) -> Tensor:
        return samples_B.new_empty(tuple(shape), dtype=torch.float32)

    operation.register_fake(shaped)
    return operation


@dataclass(frozen=True, slots=True)
class DropoutRng:
    """What dropout masks are drawn from: the run's seed and the global numbers of the samples
    (B)."""

    seed: int
    samples_B: Tensor
    key: tuple[int, int] = field(init=False)
    draw: Callable[..., Tensor] = field(init=False)
    """Like the key made here, where no compiler looks on."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", philox_key(self.seed, "dropout"))
        object.__setattr__(self, "draw", _mask_operation())

    def mask(self, shape: Sequence[int], rate: float, *, layer: int, dropout_id: int) -> Tensor:
        """A mask over activations of `shape` (B, ..., width): 1 / (1 - rate) where kept, else 0.

        It hangs on seed, sample, layer, site and the element's place in its own sample alone, so
        rows may be grouped into any micro-batch on any process and are masked alike.
        """
        mask: Tensor = self.draw(self.samples_B, self.key, layer * 16 + dropout_id, shape, rate)
        return mask
