"""Embeddings of the last two and three ids, for the `fast` family: memory that costs a lookup and
no product.

A table row is picked by a hash of the ids, so there are far fewer rows than n-grams and some share
one. After the hashed n-gram embeddings of "Byte Latent Transformer" (Pagnoni et al., 2024) and of
public speed runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Odd 31-bit multipliers, one for each place of a gram counted from its last id.
_MULTIPLIERS = (0x2545F491, 0x5BD1E995, 0x1B873593)
_LONGEST = 3


class NgramEmbedding(nn.Module):
    """A table of `rows` rows for bigrams and one for trigrams; both start at zero, so they start as
    nothing.

    With `sparse_gradients` the backward pass names the rows that were read instead of filling whole
    tables.
    """

    sparse_gradients = False

    def __init__(self, rows: int, d_model: int) -> None:
        super().__init__()
        self.rows = rows
        self.bigram_embedding = nn.Embedding(rows, d_model)
        self.trigram_embedding = nn.Embedding(rows, d_model)

    def forward(self, ids_BT: Tensor, before_BP: Tensor) -> Tensor:
        """The sum of both embeddings (B, T, D) at `ids_BT`, which follow the ids `before_BP`.

        At the start of a text, where ids are missing, a gram is read as if zeros stood before it.
        """
        T = ids_BT.shape[1]
        known = torch.cat([before_BP[:, -(_LONGEST - 1) :], ids_BT], dim=1) + 1
        padded = F.pad(known, (T + _LONGEST - 1 - known.shape[1], 0))
        # places[i] holds the id i places before each position.
        places = [padded[:, _LONGEST - 1 - i : _LONGEST - 1 - i + T] for i in range(_LONGEST)]
        mixed = [place * factor for place, factor in zip(places, _MULTIPLIERS, strict=True)]
        bigram, trigram = mixed[0] ^ mixed[1], mixed[0] ^ mixed[1] ^ mixed[2]
        return self._look_up(self.bigram_embedding, bigram) + self._look_up(
            self.trigram_embedding, trigram
        )

    def _look_up(self, table: nn.Embedding, mixed: Tensor) -> Tensor:
        return F.embedding(self._row(mixed), table.weight, sparse=self.sparse_gradients)

    def _row(self, mixed: Tensor) -> Tensor:
        mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0x7FFFFFFFFFFFFFFF
        return (mixed ^ (mixed >> 17)) % self.rows
