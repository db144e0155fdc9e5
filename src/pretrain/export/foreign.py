"""What was read of somebody else's model: architecture, tokenizer, and a reader of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pretrain.export.layouts import FormatError
from pretrain.model import Decoder, ModelConfig, build
from pretrain.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ForeignModel:
    """A model in another program's files, checked to be whole; nothing of its weights is read
    yet."""

    format: str
    """What the files are, for people."""
    files: tuple[Path, ...]
    config: ModelConfig
    tokenizer: Tokenizer
    """Of just as many entries as the model has."""
    parameters: Callable[[], Iterator[tuple[str, Tensor]]]
    """Our parameters by name, float32, one after the other."""

    def build(self, *, device: str = "cpu") -> Decoder:
        """The decoder with these weights."""
        decoder = build(self.config, vocab_size=self.tokenizer.vocab_size, seed=None, device=device)
        own = dict(decoder.named_parameters())
        for name, values in self.parameters():
            own[name].data.copy_(values)
        return decoder


def fitting(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer with as many entries as the model, which may have some without use at the end.
    FormatError for a model with fewer than the tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise FormatError(
            f"the tokenizer has {tokenizer.vocab_size:,} entries, and the model only {vocab_size:,}"
        )
    return tokenizer if tokenizer.vocab_size == vocab_size else tokenizer.padded(vocab_size)
