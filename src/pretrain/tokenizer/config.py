"""The section `tokenizer` of a config: how text becomes ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pretrain.validation import NON_EMPTY, Checked, FieldError, Matching, Range

TRAINED_NAMES = ("bpe", "gpt", "characters", "bytes")
"""Names of tokenizers that are trained on the corpus; any other name but gpt2 is a path."""

N_BYTES_VOCABULARY = 257
"""256 bytes and the end-of-text token: the vocabulary of `bytes`, and the smallest of `bpe`."""

MAX_VOCAB_SIZE = 1 << 24
"""Far above any vocabulary that was ever trained; more is an error in the config."""
_NAME = Matching(NON_EMPTY, f"{', '.join(TRAINED_NAMES)}, gpt2, or a path")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig(Checked):
    """The section `tokenizer`."""

    section = "tokenizer"

    name: Annotated[str, _NAME] = "bpe"
    """bpe, gpt, characters or bytes, trained on the data; gpt2; or a folder or file of a tokenizer:
    tokenizer.json, encoder.json with vocab.bpe, tiktoken's ranks, SentencePiece's model"""
    vocab_size: Annotated[int | None, Range(2, MAX_VOCAB_SIZE)] = None
    """size of a bpe vocabulary, the end-of-text token included, at least 257; empty:
    chosen from the amount of text, 257 (single bytes) for less than 100 kB"""

    def conflicts(self) -> Iterator[FieldError]:
        size, least = self.vocab_size, N_BYTES_VOCABULARY
        if self.name == "bpe" and size is not None and size < least:
            yield (
                "vocab_size name",
                f"tokenizer.vocab_size is {size}; it must be at least {least} for bpe: every byte "
                "and the end-of-text token",
            )
        if self.name == "bytes" and size not in (None, least):
            yield (
                "vocab_size name",
                f"tokenizer.vocab_size is {size}; it must be {least} for the tokenizer 'bytes'; "
                "leave it out, or use --tokenizer.name bpe",
            )
