"""Tensor names and shapes of other programs <-> our parameters.

A `Layout` maps their modules to ours; `families` has one for each family and format. From it come
the tensors that a file must contain, with their shapes, and both conversions. Tensors that are
missing, unexpected or of another shape are one FormatError that lists them all, before any number
is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.model.config import ModelConfig
from pretrain.model.decoder import Decoder

Read = Callable[[str], Tensor]
"""Reads a tensor by its name."""
Rounded = Callable[[str, Tensor], None]
"""Called with the name of one of our parameters, and its values as a file contains them."""
Shape = tuple[int, ...]

_MAX_LISTED = 20


class FormatError(ValueError):
    """A file that does not agree with its format, or with its own description of the model."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a format stores a family. Modules are named without `.weight` and `.bias`. Several of our
    modules in one of theirs are concatenated along the outputs."""

    outside: Mapping[str, str]
    """Their module -> ours, outside of the blocks."""
    inside: Mapping[str, str]
    """Their module, with {} for the block's number -> ours in a block, several separated by
    spaces."""
    transposed: bool = False
    """Whether matrices in blocks are (inputs, outputs), as in the code of GPT and GPT-2."""
    interleaved: bool = False
    """Whether a rotary pair is elements 2i and 2i + 1 of a head; ours are i and i + E/2."""
    prefixes: tuple[str, ...] = ()
    """Prefixes that may be missing: GPT-2 was published without `transformer.`."""
    ignored: tuple[str, ...] = ()
    """Names, with {} for the block's number, of tables that other code keeps in the file and that
    are not parameters."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Name that a file with a tied head may also contain -> the tensor it must be equal to."""


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


def stored_tensors(config: ModelConfig, layout: Layout, *, vocab_size: int) -> list[StoredTensor]:
    """The tensors of a file with this decoder, in its order. Only names and shapes are made."""
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size=vocab_size)
    shapes: dict[str, Shape] = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    modules = dict(layout.outside)
    for number in range(config.n_layers):
        for theirs, ours in layout.inside.items():
            full_names = [f"blocks.{number}.{name}" for name in ours.split()]
            modules[theirs.format(number)] = " ".join(full_names)
    interleaved_heads = (
        {"query": config.n_heads, "key": config.kv_heads} if layout.interleaved else {}
    )
    tensors = []
    for theirs, ours in modules.items():
        for kind in ("weight", "bias"):
            parameters = tuple(f"{name}.{kind}" for name in ours.split())
            if parameters[0] not in shapes:
                continue
            rows = tuple(shapes[name][0] for name in parameters)
            shape = (sum(rows), *shapes[parameters[0]][1:])
            is_matrix_in_block = len(shape) == 2 and parameters[0].startswith("blocks.")
            transposed = layout.transposed and is_matrix_in_block
            tensors.append(
                StoredTensor(
                    name=f"{theirs}.{kind}",
                    shape=shape[::-1] if transposed else shape,
                    parameters=parameters,
                    rows=rows,
                    transposed=transposed,
                    n_heads=tuple(
                        interleaved_heads.get(name.split(".")[-2], 0) for name in parameters
                    ),
                )
            )
    missing = shapes.keys() - {name for tensor in tensors for name in tensor.parameters}
    if missing:
        raise FormatError(f"the format has no tensor for {', '.join(sorted(missing))}")
    return tensors


def ignore_rounded(name: str, values: Tensor) -> None:
    """The default `Rounded`: the caller does not need the rounded values."""


def to_stored(tensor: StoredTensor, read: Read) -> Tensor:
    """The tensor of a file from our parameters."""
    parts = []
    for name, n_heads in zip(tensor.parameters, tensor.n_heads, strict=True):
        values = read(name)
        parts.append(interleave(values, n_heads) if n_heads else values)
    stored = parts[0] if len(parts) == 1 else torch.cat(parts)
    return stored.T.contiguous() if tensor.transposed else stored


def to_parameters(tensors: list[StoredTensor], read: Read) -> Iterator[tuple[str, Tensor]]:
    """Yield our parameters by name, in float32, from a reader of a file's tensors; each is read
    once."""
    for tensor in tensors:
        stored = read(tensor.name).float()
        if tensor.transposed:
            stored = stored.T
        parts = torch.split(stored, list(tensor.rows))
        for name, values, n_heads in zip(tensor.parameters, parts, tensor.n_heads, strict=True):
            yield name, (deinterleave(values, n_heads) if n_heads else values).contiguous()


def match_tensors(
    tensors: list[StoredTensor], shapes: Mapping[str, Shape], *, layout: Layout, what: str
) -> dict[str, str]:
    """The name in the file of each expected tensor, and of copies, from the shapes in the file.
    FormatError that lists every tensor that is missing, unexpected, or of another shape."""
    names: dict[str, str] = {}
    differences = []
    for tensor in tensors:
        spellings = [tensor.name, *(tensor.name.removeprefix(p) for p in layout.prefixes)]
        name = next((name for name in spellings if name in shapes), None)
        if name is None:
            differences.append(f"{tensor.name} {list(tensor.shape)} is missing")
            continue
        names[tensor.name] = name
        if tuple(shapes[name]) != tensor.shape:
            differences.append(f"{name} is {list(shapes[name])}, not {list(tensor.shape)}")
    for name in sorted(shapes.keys() - set(names.values())):
        if name in layout.copies:
            names[name] = name
        elif not _is_ignored(name, layout):
            differences.append(f"{name:.200} {list(shapes[name])} is not part of this model")
    if differences:
        listed = "; ".join(differences[:_MAX_LISTED])
        if len(differences) > _MAX_LISTED:
            listed += f"; and {len(differences) - _MAX_LISTED} more"
        raise FormatError(f"{what} does not contain the model that it describes: {listed}")
    return names


def _is_ignored(name: str, layout: Layout) -> bool:
    pattern = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "{}", name)
    return any(start + pattern in layout.ignored for start in ("", *layout.prefixes))


def interleave(x: Tensor, n_heads: int) -> Tensor:
    """Rows of a projection whose rotary pairs are i and i + E/2, so that they are 2i and 2i + 1."""
    return x.view(n_heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def deinterleave(x: Tensor, n_heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return x.view(n_heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
