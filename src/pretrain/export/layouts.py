"""Tensors of other programs' files <-> our parameters, and the model that they are read into.

A `Layout` maps their modules to ours; `families` has one for each family and format. From it come
the tensors that a file must contain, with their shapes, and both conversions. Tensors that are
missing, unexpected or of another shape are one FormatError that lists them all, before any number
is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.model.config import ModelConfig
from pretrain.model.decoder import Decoder, build
from pretrain.tokenizer.tokenizer import Tokenizer

Shape = tuple[int, ...]

_MAX_LISTED = 20
_LEAST_OF_A_LAYER = 4  # the matrices of GPT-2
_MAX_VOCAB_SIZE = 1 << 24


class FormatError(ValueError):
    """A file that does not agree with its format, or with its own description of the model."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a format stores a family. Modules are named without `.weight` and `.bias`. Several of our
    modules in one of theirs are concatenated along the outputs."""

    modules: Mapping[str, str] = field(default_factory=dict)
    """Their module -> ours, several separated by spaces. A name with {}, for the block's number, is
    in a block; then so is ours."""
    own_prefix: str | None = None
    """Instead of `modules`: all names are ours, after this text."""
    transposed: bool = False
    """Whether matrices in blocks are (inputs, outputs), as in the code of GPT and GPT-2."""
    interleaved: bool = False
    """Whether a rotary pair is elements 2i and 2i + 1 of a head; ours are i and i + E/2."""
    optional_prefix: str = ""
    """What names in a file may begin with: GPT-2 was published without `transformer.`, and mlx-lm
    reads it so; transformers saves it with that."""
    ignored: tuple[str, ...] = ()
    """Patterns of the names of tables that other code keeps in the file and that are not
    parameters."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, and the parameters of ours in it."""

    name: str
    shape: Shape
    parameters: tuple[str, ...]
    rows: tuple[int, ...]
    """Of each parameter, along its first dim."""
    transposed: bool
    n_heads: tuple[int, ...]
    """Of each parameter, the number of heads whose rotary pairs are interleaved, or 0."""


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
    tensors: list[StoredTensor]
    read: Callable[[str], Tensor]
    """Reads a tensor of a file by its name."""

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield our parameters by name, float32, one at a time. FormatError for a number that is
        not finite, and for a head that is not equal to the embedding it is tied to."""
        embedding = None
        for tensor in self.tensors:
            values = self.read(tensor.name).float()
            if not bool(values.isfinite().all()):
                raise FormatError(f"all numbers in {tensor.name} must be finite")
            if tensor.parameters == ("token_embedding.weight",):
                if embedding is not None and not torch.equal(values, embedding):
                    raise FormatError(
                        f"the head {tensor.name} must be equal to the token embedding, or absent: "
                        "the config of this model ties them"
                    )
                embedding = values
            yield from to_parameters(tensor, values)

    def build(self, *, device: str = "cpu") -> Decoder:
        """The decoder with these weights."""
        decoder = build(self.config, vocab_size=self.tokenizer.vocab_size, seed=None, device=device)
        parameters = dict(decoder.named_parameters())
        for name, values in self.parameters():
            parameters[name].data.copy_(values)
        return decoder


def stored_tensors(config: ModelConfig, layout: Layout, *, vocab_size: int) -> list[StoredTensor]:
    """The tensors of a file with this decoder, in its order. Only names and shapes are made.
    FormatError for a decoder with parameters that the format lacks."""
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size=vocab_size)
    shapes: dict[str, Shape] = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    if layout.own_prefix is not None:
        modules = {layout.own_prefix + n: n for n in (name.rpartition(".")[0] for name in shapes)}
    else:
        modules = {name: ours for name, ours in layout.modules.items() if "{}" not in name}
        inside = {name: ours for name, ours in layout.modules.items() if "{}" in name}
        for number in range(config.n_layers):
            for name, ours in inside.items():
                full_names = [f"blocks.{number}.{each}" for each in ours.split()]
                modules[name.format(number)] = " ".join(full_names)
    interleaved_heads = (
        {"query": config.n_heads, "key": config.kv_heads} if layout.interleaved else {}
    )
    tensors = []
    for module, ours in modules.items():
        for kind in ("weight", "bias"):
            parameters = tuple(f"{name}.{kind}" for name in ours.split())
            if parameters[0] not in shapes:
                continue
            rows = tuple(shapes[name][0] for name in parameters)
            shape = (sum(rows), *shapes[parameters[0]][1:])
            is_matrix_in_block = len(shape) == 2 and parameters[0].startswith("blocks.")
            transposed = layout.transposed and is_matrix_in_block
            n_heads = tuple(interleaved_heads.get(name.split(".")[-2], 0) for name in parameters)
            stored_shape = shape[::-1] if transposed else shape
            name = f"{module}.{kind}"
            tensors.append(StoredTensor(name, stored_shape, parameters, rows, transposed, n_heads))
    missing = shapes.keys() - {name for tensor in tensors for name in tensor.parameters}
    if missing:
        raise FormatError(
            f"the format has no tensor for {', '.join(sorted(missing))}; a model for it must be "
            "without them"
        )
    return tensors


def to_stored(tensor: StoredTensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The tensor of a file from our parameters by name."""
    parts = []
    for name, n_heads in zip(tensor.parameters, tensor.n_heads, strict=True):
        values = parameters[name]
        parts.append(interleave(values, n_heads) if n_heads else values)
    stored = parts[0] if len(parts) == 1 else torch.cat(parts)
    return stored.T.contiguous() if tensor.transposed else stored


def to_parameters(tensor: StoredTensor, stored: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield our parameters by name, in float32, from the tensor of a file."""
    stored = stored.float().T if tensor.transposed else stored.float()
    parts = torch.split(stored, list(tensor.rows))
    for name, values, n_heads in zip(tensor.parameters, parts, tensor.n_heads, strict=True):
        yield name, (deinterleave(values, n_heads) if n_heads else values).contiguous()


def matched_model(
    format: str,
    files: tuple[Path, ...],
    *,
    config: ModelConfig,
    layout: Layout,
    tokenizer: Tokenizer,
    vocab_size: Any,
    tensors: Mapping[str, tuple[Shape, str]],
    readable: Sequence[str],
    read: Callable[[str], Tensor],
    where: Path,
) -> ImportedModel:
    """The model in a file that has these tensors, given with shape and type; at their end is a copy
    of a tied head, if there is one. FormatError that lists every tensor that is missing,
    unexpected, or of another shape, and for a type that is not readable."""
    if not tensors:
        raise FormatError(
            f"{where} has no weights; it must be the file of a model, not of its vocabulary alone"
        )
    if type(vocab_size) is not int or not 1 <= vocab_size <= _MAX_VOCAB_SIZE:
        raise FormatError(
            f"{where}: vocab_size must be a whole number from 1 to {_MAX_VOCAB_SIZE:,} (got "
            f"{vocab_size!r:.60})"
        )
    if config.n_layers * _LEAST_OF_A_LAYER > len(tensors):  # before that many layers are made
        raise FormatError(
            f"{where} describes {config.n_layers:,} layers; it must have at least "
            f"{_LEAST_OF_A_LAYER} tensors for each (got {len(tensors):,})"
        )
    found, differences = [], []
    expected = stored_tensors(config, layout, vocab_size=vocab_size)
    for tensor in expected:
        spellings = (tensor.name, layout.optional_prefix + tensor.name)
        name = next((name for name in spellings if name in tensors), None)
        if name is None:
            differences.append(f"{tensor.name} {list(tensor.shape)} is missing")
            continue
        found.append(replace(tensor, name=name))
        if tensors[name][0] != tensor.shape:
            differences.append(f"{name} is {list(tensors[name][0])}, not {list(tensor.shape)}")
    heads = {f"{name}.weight" for name, ours in layout.modules.items() if ours == "head"}
    for name in sorted(tensors.keys() - {tensor.name for tensor in found}):
        if name in heads and config.tied_head:
            embedding = next(t for t in expected if t.parameters == ("token_embedding.weight",))
            found.append(replace(embedding, name=name))
        elif not any(
            fnmatchcase(name.removeprefix(layout.optional_prefix), pattern)
            for pattern in layout.ignored
        ):
            differences.append(f"{name:.200} {list(tensors[name][0])} is not part of this model")
    if differences:
        listed = "; ".join(differences[:_MAX_LISTED])
        if len(differences) > _MAX_LISTED:
            listed += f"; and {len(differences) - _MAX_LISTED} more"
        raise FormatError(f"{where} does not contain the model that it describes: {listed}")
    for tensor in found:
        type_ = tensors[tensor.name][1]
        if type_ not in readable:
            raise FormatError(
                f"{where}: the type of {tensor.name} must be one of {', '.join(readable)} (got "
                f"{type_})"
            )
    if tokenizer.vocab_size > vocab_size:
        raise FormatError(
            f"{where}: the model must have at least the {tokenizer.vocab_size:,} tokens of its "
            f"tokenizer (got {vocab_size:,})"
        )
    if tokenizer.vocab_size < vocab_size:  # the model's last tokens are unused
        tokenizer = tokenizer.padded(vocab_size)
    return ImportedModel(format, files, config, tokenizer, found, read)


def interleave(x: Tensor, n_heads: int) -> Tensor:
    """Rows of a projection whose rotary pairs are i and i + E/2, so that they are 2i and 2i + 1."""
    return x.view(n_heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def deinterleave(x: Tensor, n_heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return x.view(n_heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def valid_stop_ids(tokenizer: Tokenizer, value: Any) -> list[int]:
    """The ids of a file's `eos_token_id`, one or a list, that are in the vocabulary; if there are
    none, the tokenizer's own."""
    ids = value if isinstance(value, list) else [value]
    valid = [id_ for id_ in ids if type(id_) is int and 0 <= id_ < tokenizer.vocab_size]
    return valid or tokenizer.stop_ids
