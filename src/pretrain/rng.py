"""Randomness without state: every random number is a pure function of a seed and a counter.

Integers come in that name the number (seed, purpose, index), and the same number comes out on every
device, in every order and for every split of the work. On the side of torch: Philox with uniform
and normal numbers. On the side of numpy, which never loads torch: a 64-bit mixing function, and the
Feistel permutation that shuffles the training text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
# Counters of one chunk of `normal`: 2^18 x 4 numbers stay near a CPU's cache.
_CHUNK = 1 << 18
_FEISTEL_ROUNDS = 6


def seed_hash(seed: int, *purpose: object) -> int:
    """Hash a seed and a purpose to 64 bits: BLAKE2b of the text "SEED/PURPOSE/..."."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def philox_key(seed: int, purpose: str) -> tuple[int, int]:
    """Return the two 32-bit words of a Philox key for a seed and a purpose."""
    key = seed_hash(seed, purpose)
    return key & _MASK_32, key >> 32


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Compute Philox 4x32 with ten rounds: four tensors of uniform 32-bit words, as int64.

    The four counter words broadcast against one another; bits above 32 are ignored. From "Parallel
    Random Numbers: As Easy as 1, 2, 3" (Salmon et al., 2011).
    """
    c0, c1, c2, c3 = (word & _MASK_32 for word in counter)
    k0, k1 = key[0] & _MASK_32, key[1] & _MASK_32
    for _ in range(10):
        # int64 multiplication wraps, so its low 64 bits are those of the unsigned product; after an
        # arithmetic shift the mask leaves just bits 32 to 63.
        p0 = c0 * _PHILOX_MULTIPLIERS[0]
        p1 = c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK_32) ^ c1 ^ k0,
            p1 & _MASK_32,
            ((p0 >> 32) & _MASK_32) ^ c3 ^ k1,
            p0 & _MASK_32,
        )
        k0 = (k0 + _PHILOX_WEYL[0]) & _MASK_32
        k1 = (k1 + _PHILOX_WEYL[1]) & _MASK_32
    return [c0, c1, c2, c3]


def float64_device(device: torch.device) -> torch.device:
    """Return the device itself, or the CPU in place of MPS, which has no float64."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device


def uniform(seed: int, purpose: str, index: Tensor) -> Tensor:
    """Float64 numbers in the open interval (0, 1), one for each element of `index` (int64), on the
    device of `index` or, if that is MPS, on the CPU."""
    import torch

    index = index.to(float64_device(index.device))
    zero = torch.zeros_like(index)
    words = philox([index, index >> 32, zero, zero], philox_key(seed, purpose))
    return (words[0].double() + 0.5) / 2**32


def normal(seed: int, name: str, start: int, stop: int, *, device: torch.device) -> Tensor:
    """Elements [start, stop) of the endless standard normal sequence called `name`, as float32.

    Box and Muller (1958) in float64, so that the last float32 bit does not depend on the device's
    logarithm.
    """
    import torch

    parts = []
    key = philox_key(seed, name)
    first = start // 4
    last = (stop + 3) // 4
    for chunk in range(first, last, _CHUNK):
        index = torch.arange(chunk, min(chunk + _CHUNK, last), device=float64_device(device))
        zero = torch.zeros_like(index)
        words = philox([index, index >> 32, zero, zero], key)
        u = [(word.double() + 0.5) / 2**32 for word in words]
        pairs = []
        for a, b in ((u[0], u[1]), (u[2], u[3])):
            radius = torch.sqrt(-2.0 * torch.log(a))
            pairs += [radius * torch.cos(2 * math.pi * b), radius * torch.sin(2 * math.pi * b)]
        parts.append(torch.stack(pairs, dim=1).flatten().float().to(device))
    values = torch.cat(parts) if parts else torch.empty(0, device=device)
    return values[start - 4 * first : stop - 4 * first]


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit numbers one to one, so that every output bit depends on every input bit.

    The finalizer of SplitMix64, "Fast Splittable Pseudorandom Number Generators" (Steele, Lea,
    Flood, 2014).
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class FeistelPermutation:
    """A keyed permutation of range(size) in constant memory, with its inverse.

    A balanced Feistel network on the next even number of bits ("How to Construct Pseudorandom
    Permutations", Luby and Rackoff, 1988). A result outside the range is permuted again until it is
    inside ("Ciphers with Arbitrary Finite Domains", Black and Rogaway, 2002), on average fewer than
    four times.
    """

    size: int
    seed: int
    purpose: str

    def forward(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Permute indices in [0, size), any shape."""
        return self._permute(index, inverse=False)

    def inverse(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Undo `forward`."""
        return self._permute(index, inverse=True)

    def _permute(self, index: NDArray[np.int64], *, inverse: bool) -> NDArray[np.int64]:
        assert index.size == 0 or (index.min() >= 0 and index.max() < self.size), "out of range"
        values = self._network(index.astype(np.uint64), inverse=inverse)
        while (outside := values >= np.uint64(self.size)).any():
            values[outside] = self._network(values[outside], inverse=inverse)
        return values.astype(np.int64)

    def _network(self, values: NDArray[np.uint64], *, inverse: bool) -> NDArray[np.uint64]:
        """Apply all rounds once: a permutation of all numbers of 2 x half_bits bits."""
        half_bits = max(1, (max(1, self.size - 1).bit_length() + 1) // 2)
        bits = np.uint64(half_bits)
        mask = np.uint64((1 << half_bits) - 1)
        keys = [np.uint64(seed_hash(self.seed, self.purpose, n)) for n in range(_FEISTEL_ROUNDS)]
        left, right = values >> bits, values & mask
        if inverse:
            for key in reversed(keys):
                left, right = right ^ (splitmix64(left ^ key) & mask), left
        else:
            for key in keys:
                left, right = right, left ^ (splitmix64(right ^ key) & mask)
        return (left << bits) | right
