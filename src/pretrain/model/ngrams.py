"""Embeddings of the last few ids together, for the `fast` family: memory that costs a lookup and no
product.

Hashed tables: a row is picked by a hash of the last n ids, so there are far fewer rows than n-grams
and some share one. After the hashed n-gram embeddings of "Byte Latent Transformer" (Pagnoni et al.,
2024) and of public speed runs. An embedding lies in parts, one for each head, and each part is
picked by a hash of its own: two n-grams that share one part hardly ever share another. "Hash
Embeddings for Efficient Word Representations" (Svenstrup et al., 2017); "Conditional Memory via
Scalable Lookup" (Cheng et al., 2026).

Recalled ids: where the last n ids stood once before in the window, an embedding of the id that
followed them there. It is what an induction head finds ("In-context Learning and Induction Heads",
Olsson et al., 2022) and small models learn late; given as in the n-gram heads of "In-Context
Language Learning" (Akyürek et al., 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.model.config import LONGEST_NGRAM, ModelConfig
from pretrain.model.layers import Embedding

# Odd 32-bit multipliers, one for each place of a gram counted from its last id.
_MULTIPLIERS = (
    *(0x2545F491, 0x5BD1E995, 0x1B873593, 0x27D4EB2F),
    *(0x165667B1, 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35),
)
assert len(_MULTIPLIERS) == LONGEST_NGRAM


class NgramEmbedding(nn.Module):
    """A table for each length of n-gram, and one for each length that is recalled; all start at
    zero, so they start as nothing.

    With `sparse_gradients` the backward pass names the rows that were read instead of filling whole
    tables.
    """

    sparse_gradients = False

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.rows, self.n_parts, d = config.ngram_rows, config.n_heads, config.d_model
        lengths, shape = config.ngram_lengths, (self.n_parts * self.rows, config.d_head)
        self.parts = nn.ModuleDict({str(n): Embedding(*shape) for n in lengths})
        # Row 0 is for "it did not occur before".
        recalled = range(1, config.induction + 1)
        self.recalled = nn.ModuleDict({str(n): Embedding(vocab_size + 1, d) for n in recalled})

    def forward(self, ids_BT: Tensor, before_BP: Tensor) -> Tensor:
        """The sum of all embeddings (B, T, D) at `ids_BT`, which follow the ids `before_BP`.

        At the start of a text, where ids are missing, a gram is read as if zeros stood before it.
        """
        T, ids_BS = ids_BT.shape[1], torch.cat([before_BP, ids_BT], dim=1)
        rows = [self._rows_of(ngram_hashes(ids_BS, int(n))) for n in self.parts]
        rows += [followers(ids_BS, int(n))[..., None] for n in self.recalled]
        parts = [
            F.embedding(rows_BSP[:, -T:], table, sparse=self.sparse_gradients).flatten(2)
            for table, rows_BSP in zip(self.parameters(), rows, strict=True)
        ]
        return sum(parts[1:], parts[0])

    def _rows_of(self, hashes_BS: Tensor) -> Tensor:
        """The row of each part of the embeddings of n-grams (B, S, P), of a table in which the rows
        of part p begin at p times `rows`."""
        parts_P = torch.arange(self.n_parts, device=hashes_BS.device)
        # Times an odd number for each part, with room for the product. What a compiler for GPUs
        # makes of an arange alone has 32 bits, so no large number may meet one.
        apart_BSP = (hashes_BS >> 8)[..., None] * (2 * parts_P + 1)
        return _mixed(apart_BSP) % self.rows + parts_P * self.rows


def ngram_hashes(ids_BS: Tensor, n: int) -> Tensor:
    """A number for the n ids that end at each position (B, S)."""
    S = ids_BS.shape[1]
    padded = F.pad(ids_BS + 1, (n - 1, 0))
    mixed = padded[:, n - 1 :] * _MULTIPLIERS[0]
    for back in range(1, n):
        mixed = mixed ^ (padded[:, n - 1 - back : n - 1 - back + S] * _MULTIPLIERS[back])
    return _mixed(mixed)


def _mixed(numbers: Tensor) -> Tensor:
    """Another number below 2^63 for each; of those below it no two become one."""
    numbers = (numbers ^ (numbers >> 15)) * 0x2C1B3C6D & 0x7FFFFFFFFFFFFFFF
    return numbers ^ (numbers >> 17)


def followers(ids_BS: Tensor, n: int) -> Tensor:
    """1 + the id that followed the n ids ending at each position where they stood last before in
    their row (B, S); 0 where they did not."""
    hashes = ngram_hashes(ids_BS, n)
    # A stable sort puts the places of a gram beside each other, in the order of time.
    places = hashes.argsort(dim=1, stable=True)
    in_order = hashes.gather(1, places)
    is_same = in_order[:, 1:] == in_order[:, :-1]
    following = ids_BS.gather(1, (places[:, :-1] + 1).clamp(max=ids_BS.shape[1] - 1)) + 1
    found = torch.where(is_same, following, 0)
    return torch.zeros_like(ids_BS).scatter_(1, places[:, 1:], found)
