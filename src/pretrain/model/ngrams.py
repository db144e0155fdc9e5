"""Embeddings of the last few ids, for the family `fast`: parameters without matmuls.

Hashed n-gram tables: a hash of the last n ids picks a row, so a table has far fewer rows than there
are n-grams, and some share one. After the hash n-gram embeddings of "Byte Latent Transformer"
(Pagnoni et al., 2024) and of public speed runs. An embedding is split into parts, one for each
head, and each part has a hash of its own, so that two n-grams that share one part hardly ever share
another: "Hash Embeddings for Efficient Word Representations" (Svenstrup et al., 2017);
"Conditional Memory via Scalable Lookup" (Cheng et al., 2026).

Induction (copy) embeddings: an embedding of the id that followed the last n ids at their previous
occurrence in the window. Induction heads compute this ("In-context Learning and Induction Heads",
Olsson et al., 2022), and small models learn them late; after the n-gram heads of "In-Context
Language Learning" (Akyürek et al., 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.model.config import LONGEST_NGRAM, ModelConfig
from pretrain.model.dropout import TABLE_DROPOUT_ID, DropoutRng
from pretrain.model.layers import Embedding

# Odd 32-bit multipliers of the ids of an n-gram, the last id first.
_MULTIPLIERS = (
    0x2545F491,
    0x5BD1E995,
    0x1B873593,
    0x27D4EB2F,
    0x165667B1,
    0x9E3779B1,
    0x85EBCA6B,
    0xC2B2AE35,
)
assert len(_MULTIPLIERS) == LONGEST_NGRAM


class NgramEmbedding(nn.Module):
    """A hashed table for each length of n-gram, and an induction embedding for each length.

    All start at zero. With `sparse_gradients` the backward pass gives the rows that were read and
    their gradients, instead of a dense gradient of all rows.
    """

    sparse_gradients = False

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.rows, self.n_parts = config.rows_of_a_table, config.n_heads
        self.table_dropout = config.table_dropout
        shape = self.n_parts * self.rows, config.d_head
        self.parts = nn.ModuleDict({str(n): Embedding(*shape) for n in config.ngram_lengths})
        # Row 0 is for n-grams without a previous occurrence.
        shape, lengths = (vocab_size + 1, config.d_model), range(1, config.induction + 1)
        self.recalled = nn.ModuleDict({str(n): Embedding(*shape) for n in lengths})

    def forward(
        self, ids_BT: Tensor, previous_ids_BP: Tensor, dropout_rng: DropoutRng | None = None
    ) -> Tensor:
        """Return the sum of all embeddings (B, T, D) at `ids_BT`, which follow `previous_ids_BP`.

        Before the first id of a text an n-gram is padded. With an rng some are dropped whole.
        """
        T = ids_BT.shape[1]
        ids_BS = torch.cat([previous_ids_BP, ids_BT], dim=1)
        rows = [self._table_rows(ngram_hashes(ids_BS, int(n))) for n in self.parts]
        rows += [induction_ids(ids_BS, int(n))[..., None] for n in self.recalled]
        embeddings = [
            F.embedding(rows_BSP[:, -T:], table, sparse=self.sparse_gradients).flatten(2)
            for table, rows_BSP in zip(self.parameters(), rows, strict=True)
        ]
        if dropout_rng is not None and self.table_dropout:
            shape = (*ids_BT.shape, len(self.parts))
            mask_BTN = dropout_rng.mask(
                shape, self.table_dropout, layer=0, dropout_id=TABLE_DROPOUT_ID
            )
            for i, kept_BT in enumerate(mask_BTN.unbind(-1)):
                embeddings[i] = embeddings[i] * kept_BT[..., None].to(embeddings[i].dtype)
        return sum(embeddings[1:], embeddings[0])

    def _table_rows(self, hashes_BS: Tensor) -> Tensor:
        """Return the row (B, S, P) of each part; the rows of part p start at p times `rows`."""
        parts_P = torch.arange(self.n_parts, device=hashes_BS.device)
        # The shift leaves space for the product with an odd number for each part. Compiled for a
        # GPU an arange has 32 bits, so it must not be multiplied with a large constant.
        hashes_BSP = (hashes_BS >> 8)[..., None] * (2 * parts_P + 1)
        return _mix(hashes_BSP) % self.rows + parts_P * self.rows


def ngram_hashes(ids_BS: Tensor, n: int) -> Tensor:
    """Return a hash (B, S), below 2^63, of the n ids that end at each position."""
    S = ids_BS.shape[1]
    padded = F.pad(ids_BS + 1, (n - 1, 0))
    hashes_BS = padded[:, n - 1 :] * _MULTIPLIERS[0]
    for back in range(1, n):
        hashes_BS = hashes_BS ^ (padded[:, n - 1 - back : n - 1 - back + S] * _MULTIPLIERS[back])
    return _mix(hashes_BS)


def _mix(numbers: Tensor) -> Tensor:
    """Mix the bits of integers, to below 2^63; a bijection of the integers below 2^63."""
    numbers = (numbers ^ (numbers >> 15)) * 0x2C1B3C6D & 0x7FFFFFFFFFFFFFFF
    return numbers ^ (numbers >> 17)


def induction_ids(ids_BS: Tensor, n: int) -> Tensor:
    """Return 1 + the id that followed the previous occurrence of the n ids that end at each
    position (B, S), or 0 at a first occurrence in the row.

    For n = 1 the row 5 7 5 7 gives 0 0 8 6.
    """
    hashes_BS = ngram_hashes(ids_BS, n)
    # A stable sort brings the positions of an n-gram next to each other, in the order of time.
    positions = hashes_BS.argsort(dim=1, stable=True)
    sorted_hashes = hashes_BS.gather(1, positions)
    is_repeated = sorted_hashes[:, 1:] == sorted_hashes[:, :-1]
    next_positions = (positions[:, :-1] + 1).clamp(max=ids_BS.shape[1] - 1)
    next_ids = ids_BS.gather(1, next_positions) + 1
    next_ids = torch.where(is_repeated, next_ids, 0)
    return torch.zeros_like(ids_BS).scatter_(1, positions[:, 1:], next_ids)
