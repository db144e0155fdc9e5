"""A model read from another program's files, and the checks that every format shares."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.export.layouts import FormatError, Layout, Read, StoredTensor, to_parameters
from pretrain.model import Decoder, ModelConfig, build
from pretrain.tokenizer import Tokenizer

_LARGEST_VOCABULARY = 1 << 24


@dataclass(frozen=True, slots=True)
class ImportedModel:
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


def checked_parameters(
    tensors: list[StoredTensor], read: Read, *, layout: Layout, names: Container[str]
) -> Iterator[tuple[str, Tensor]]:
    """Our parameters from a reader of their tensors, of which the file has `names`. FormatError for
    a number that is not finite, and for a head beside a tied one that says something else."""
    own = {stored.name for stored in tensors}
    for copy, original in layout.copies.items():
        if copy not in names or copy in own:
            continue
        if not torch.equal(read(copy).float(), read(original).float()):
            raise FormatError(
                f"the file's head {copy} is not its token embedding {original}; legal for a model "
                "whose head is tied: a copy of it, or none"
            )
    return to_parameters(tensors, lambda name: finite(name, read(name).float()))


def finite(name: str, values: Tensor) -> Tensor:
    """The same values. FormatError where one is infinite or not a number."""
    if not bool(values.isfinite().all()):
        raise FormatError(f"{name} holds numbers that are not finite; legal: none")
    return values


def checked_vocab_size(value: Any) -> int:
    """A number of entries that a file gives. FormatError where it is none, or larger than any."""
    if type(value) is not int or not 1 <= value <= _LARGEST_VOCABULARY:
        raise FormatError(
            f"vocab_size is {value!r:.60}; legal: a whole number from 1 to {_LARGEST_VOCABULARY:,}"
        )
    return value


def named_ends(tokenizer: Tokenizer, said: Any) -> list[int]:
    """The ids that a file says a text ends with, one or several, as far as they exist; where it
    names none the vocabulary's own."""
    ids = said if isinstance(said, list) else [said]
    return [
        i for i in ids if type(i) is int and 0 <= i < tokenizer.vocab_size
    ] or tokenizer.stop_ids


def fitting(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer with as many entries as the model, which may have some without use at the end.
    FormatError for a model with fewer than the tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise FormatError(
            f"the tokenizer has {tokenizer.vocab_size:,} entries, and the model only {vocab_size:,}"
        )
    return tokenizer if tokenizer.vocab_size == vocab_size else tokenizer.padded(vocab_size)
