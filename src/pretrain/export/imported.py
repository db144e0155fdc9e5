"""A model read from another program's files, and the checks that every format shares."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.export.layouts import FormatError, Layout, Read, StoredTensor, to_parameters
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import Decoder, build
from pretrain.tokenizer.tokenizer import Tokenizer

_MAX_VOCAB_SIZE = 1 << 24


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """A model in another program's files, whose names and shapes are checked; no weight is read
    yet."""

    format: str
    """The format, for messages."""
    files: tuple[Path, ...]
    config: ModelConfig
    tokenizer: Tokenizer
    """With exactly the model's vocabulary size."""
    parameters: Callable[[], Iterator[tuple[str, Tensor]]]
    """Yields our parameters by name, float32, one at a time."""

    def build(self, *, device: str = "cpu") -> Decoder:
        """The decoder with these weights."""
        decoder = build(self.config, vocab_size=self.tokenizer.vocab_size, seed=None, device=device)
        parameters = dict(decoder.named_parameters())
        for name, values in self.parameters():
            parameters[name].data.copy_(values)
        return decoder


def checked_parameters(
    tensors: list[StoredTensor], read: Read, *, layout: Layout, names: Container[str]
) -> Iterator[tuple[str, Tensor]]:
    """Our parameters from a reader of a file's tensors, which have the `names`. FormatError for a
    number that is not finite, and for a head that is not equal to the embedding it is tied to."""
    expected = {tensor.name for tensor in tensors}
    for copy, original in layout.copies.items():
        if copy not in names or copy in expected:
            continue
        if not torch.equal(read(copy).float(), read(original).float()):
            raise FormatError(
                f"the head {copy} must be equal to the token embedding {original}, or absent: the "
                "config of this model ties them"
            )
    return to_parameters(tensors, lambda name: finite(name, read(name).float()))


def finite(name: str, values: Tensor) -> Tensor:
    """The same values. FormatError if one is infinite or NaN."""
    if not bool(values.isfinite().all()):
        raise FormatError(f"all numbers in {name} must be finite")
    return values


def checked_vocab_size(value: Any) -> int:
    """The vocabulary size in a file. FormatError if it is not a possible one."""
    if type(value) is not int or not 1 <= value <= _MAX_VOCAB_SIZE:
        raise FormatError(
            f"vocab_size must be a whole number from 1 to {_MAX_VOCAB_SIZE:,} (got {value!r:.60})"
        )
    return value


def valid_stop_ids(tokenizer: Tokenizer, value: Any) -> list[int]:
    """The ids of a file's `eos_token_id`, one or a list, that are in the vocabulary; if there are
    none, the tokenizer's own."""
    ids = value if isinstance(value, list) else [value]
    valid = [id_ for id_ in ids if type(id_) is int and 0 <= id_ < tokenizer.vocab_size]
    return valid or tokenizer.stop_ids


def padded_to(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer with the model's vocabulary size, whose last tokens may be unused. FormatError
    if the model has fewer tokens than the tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise FormatError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, and the model only {vocab_size:,}"
        )
    return tokenizer if tokenizer.vocab_size == vocab_size else tokenizer.padded(vocab_size)
