"""How text becomes ids: the fields of the section `tokenizer` of a config, and their ranges.

Plain values come in from a file or the command line; a value that no corpus could satisfy is a
ValueError at once, one that this corpus cannot satisfy is a ValueError when the tokenizer is
trained, before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TRAINED_NAMES = ("bpe", "gpt", "characters", "bytes")
"""Names that are made from the corpus; anything else is a path."""

N_BYTES_VOCABULARY = 257
"""256 bytes and the end-of-text token: what `bytes` has, and the least that `bpe` can have."""

LARGEST_VOCABULARY = 1 << 24
"""Far above any that was ever trained: beyond it is a slip of the pen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """The section `tokenizer`."""

    name: str = "bpe"
    """bpe, gpt, characters or bytes, trained on the data; gpt2; or a folder or file of a tokenizer:
    tokenizer.json, encoder.json with vocab.bpe, tiktoken's ranks, SentencePiece's model."""
    vocab_size: int | None = None
    """Entries of a bpe vocabulary, end-of-text token included, at least 257; by default chosen from
    the amount of text."""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        if not isinstance(self.name, str) or not self.name:
            yield (
                "name",
                f"tokenizer.name is {self.name!r}; legal: {', '.join(TRAINED_NAMES)}, gpt2, or a "
                "path",
            )
        try:
            check_vocab_size(self.vocab_size, name=self.name)
        except ValueError as error:
            size = self.vocab_size
            some_can = isinstance(size, int) and 2 <= size <= LARGEST_VOCABULARY
            yield "vocab_size name" if some_can else "vocab_size", str(error)


def check_vocab_size(vocab_size: int | None, *, name: str) -> None:
    """ValueError for a vocabulary size that the tokenizer `name` cannot have, whatever the
    corpus."""
    if vocab_size is None:
        return
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise ValueError(f"tokenizer.vocab_size is {vocab_size!r}; legal: a whole number from 257")
    if vocab_size > LARGEST_VOCABULARY:
        raise ValueError(
            f"tokenizer.vocab_size is {vocab_size}; legal: at most {LARGEST_VOCABULARY:,}"
        )
    if name == "bpe" and vocab_size < N_BYTES_VOCABULARY:
        raise ValueError(
            f"tokenizer.vocab_size is {vocab_size}; legal: {N_BYTES_VOCABULARY} (every byte and "
            "the end-of-text "
            "token) or more"
        )
    if name == "bytes" and vocab_size != N_BYTES_VOCABULARY:
        raise ValueError(
            f"tokenizer.vocab_size is {vocab_size}, but the tokenizer 'bytes' always has "
            f"{N_BYTES_VOCABULARY} entries; leave it out, or take --tokenizer.name bpe"
        )
    if vocab_size < 2:
        raise ValueError(f"tokenizer.vocab_size is {vocab_size}; legal: 2 or more")
