"""Randomness without state: every random number is a pure function of a key and a counter.

Goes in: integers that say what the number is for (seed, sample, layer, site, position, element).
Comes out: the same number on every device, in every order, for every split of the work. Philox 4x32
with ten rounds, from "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et al., 2011), on int64
tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Counters of one initialisation step: 2^18 x 4 numbers keep the working set near a CPU's cache.
_CHUNK = 1 << 18


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four tensors of uniform 32-bit words (held in int64) from four counter words and a 64-bit
    key.

    The counter words broadcast against one another. Words above 32 bits are cut off.
    """
    c0, c1, c2, c3 = (c & _MASK for c in counter)
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(10):
        # int64 multiplication wraps, so its low 64 bits are those of the unsigned product; after an
        # arithmetic shift the mask leaves just bits 32 to 63.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def key_of(seed: int, purpose: str) -> tuple[int, int]:
    """A 64-bit Philox key from the run's seed and what the numbers are for."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def with_float64(device: torch.device) -> torch.device:
    """The device, and in place of MPS, which has no float64, the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def uniform(seed: int, purpose: str, index: Tensor) -> Tensor:
    """Float64 numbers in the open interval (0, 1), one for each element of `index` (int64), which
    lie where there is float64."""
    index = index.to(with_float64(index.device))
    zero = torch.zeros_like(index)
    words = philox([index, index >> 32, zero, zero], key_of(seed, purpose))
    return (words[0].double() + 0.5) / 2**32


def normal(seed: int, name: str, start: int, stop: int, *, device: torch.device) -> Tensor:
    """Elements [start, stop) of the endless standard normal sequence called `name`, as float32.

    Box and Muller (1958) in float64, so that the last float32 bit does not hang on the device's
    log.
    """
    parts = []
    key = key_of(seed, name)
    first, last = start // 4, -(-stop // 4)
    for begin in range(first, last, _CHUNK):
        index = torch.arange(begin, min(begin + _CHUNK, last), device=with_float64(device))
        zero = torch.zeros_like(index)
        words = philox([index, index >> 32, zero, zero], key)
        u = [(w.double() + 0.5) / 2**32 for w in words]
        pairs = []
        for a, b in ((u[0], u[1]), (u[2], u[3])):
            radius = torch.sqrt(-2.0 * torch.log(a))
            pairs += [radius * torch.cos(2 * math.pi * b), radius * torch.sin(2 * math.pi * b)]
        parts.append(torch.stack(pairs, dim=1).flatten().float().to(device))
    values = torch.cat(parts) if parts else torch.empty(0, device=device)
    return values[start - 4 * first : stop - 4 * first]


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
class Noise:
    """What dropout masks are drawn from: the run's seed and the global numbers of the samples
    (B)."""

    seed: int
    samples_B: Tensor
    key: tuple[int, int] = field(init=False)
    draw: Callable[..., Tensor] = field(init=False)
    """Like the key made here, where no compiler looks on."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", key_of(self.seed, "dropout"))
        object.__setattr__(self, "draw", _mask_operation())

    def keep(self, shape: Sequence[int], rate: float, *, layer: int, site: int) -> Tensor:
        """A mask over activations of `shape` (B, ..., width): 1 / (1 - rate) where kept, else 0.

        It hangs on seed, sample, layer, site and the element's place in its own sample alone, so
        rows may be grouped into any micro-batch on any process and are masked alike.
        """
        mask: Tensor = self.draw(self.samples_B, self.key, layer * 16 + site, shape, rate)
        return mask
