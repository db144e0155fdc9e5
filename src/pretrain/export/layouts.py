"""Other people's names and shapes for our parameters: one table a family and format, used both
ways.

A table says which of their modules holds which of ours. From it come the tensors that a file must
hold, with their shapes, and the two conversions. What a file lacks, has too much or has in another
shape is one error that lists it all, before a number is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.model import Decoder, ModelConfig

Read = Callable[[str], Tensor]
"""Gives a tensor by its name."""
Rounded = Callable[[str, Tensor], None]
"""Is given a parameter of ours by its name, as a file holds it."""
Shape = tuple[int, ...]

_MOST_DIFFERENCES = 20


class FormatError(ValueError):
    """A file that is not what its format, or its own description of the model, says."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a format stores a family. Modules are named without `.weight` and `.bias`; several of
    ours in one of theirs lie one after the other along the outputs."""

    outside: Mapping[str, str]
    """Their module -> ours, outside of the blocks."""
    inside: Mapping[str, str]
    """Their module, with {} for the block's number -> ours in a block, several apart by spaces."""
    transposed: bool = False
    """Whether matrices in blocks are (inputs, outputs), as in GPT and GPT-2's own code."""
    interleaved: bool = False
    """Whether a rotary pair is elements 2i and 2i + 1 of a head; ours are i and i + E/2."""
    prefixes: tuple[str, ...] = ()
    """What may be missing before their names: GPT-2 was published without `transformer.`."""
    ignored: tuple[str, ...] = ()
    """Names, with {} for the block's number, that hold no parameters: tables that other code keeps
    in the file."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Name that a file of a tied head may hold too -> the tensor that it must be a copy of."""


_GPT2_INSIDE = {
    "{}.ln_1": "attention_norm",
    "{}.attn.c_attn": "attention.query attention.key attention.value",
    "{}.attn.c_proj": "attention.output",
    "{}.ln_2": "feed_forward_norm",
    "{}.mlp.c_fc": "feed_forward.up",
    "{}.mlp.c_proj": "feed_forward.down",
}
_LLAMA_INSIDE = {
    "{}.input_layernorm": "attention_norm",
    "{}.self_attn.q_proj": "attention.query",
    "{}.self_attn.k_proj": "attention.key",
    "{}.self_attn.v_proj": "attention.value",
    "{}.self_attn.o_proj": "attention.output",
    "{}.post_attention_layernorm": "feed_forward_norm",
    "{}.mlp.gate_proj": "feed_forward.gate",
    "{}.mlp.up_proj": "feed_forward.up",
    "{}.mlp.down_proj": "feed_forward.down",
}
_GGUF_ATTENTION = {
    "blk.{}.attn_norm": "attention_norm",
    "blk.{}.attn_output": "attention.output",
    "blk.{}.ffn_norm": "feed_forward_norm",
    "blk.{}.ffn_up": "feed_forward.up",
    "blk.{}.ffn_down": "feed_forward.down",
}

HUGGING_FACE: dict[str, Layout] = {
    "gpt": Layout(
        {
            "transformer.tokens_embed": "token_embedding",
            "transformer.positions_embed": "position_embedding",
        },
        {f"transformer.h.{theirs}": ours for theirs, ours in _GPT2_INSIDE.items()},
        transposed=True,
        prefixes=("transformer.",),
        ignored=("transformer.h.{}.attn.bias", "transformer.position_ids"),
        copies={"lm_head.weight": "transformer.tokens_embed.weight"},
    ),
    "gpt2": Layout(
        {
            "transformer.wte": "token_embedding",
            "transformer.wpe": "position_embedding",
            "transformer.ln_f": "final_norm",
        },
        {f"transformer.h.{theirs}": ours for theirs, ours in _GPT2_INSIDE.items()},
        transposed=True,
        prefixes=("transformer.",),
        ignored=("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
        copies={"lm_head.weight": "transformer.wte.weight"},
    ),
    "llama": Layout(
        {"model.embed_tokens": "token_embedding", "model.norm": "final_norm", "lm_head": "head"},
        {f"model.layers.{theirs}": ours for theirs, ours in _LLAMA_INSIDE.items()},
        ignored=("model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
        copies={"lm_head.weight": "model.embed_tokens.weight"},
    ),
}
# Of modeling_pretrain.py: our own names, whatever the architecture.
OWN = Layout(
    {
        f"model.{name}": name
        for name in (
            *("token_embedding", "position_embedding", "final_norm", "head"),
            *(f"ngrams.{kind}.{n}" for kind in ("parts", "recalled") for n in range(1, 9)),
        )
    },
    {f"model.blocks.{{}}.{name}": name for name in _LLAMA_INSIDE.values()},
)

GGUF: dict[str, Layout] = {
    "gpt2": Layout(
        {
            "token_embd": "token_embedding",
            "position_embd": "position_embedding",
            "output_norm": "final_norm",
        },
        {**_GGUF_ATTENTION, "blk.{}.attn_qkv": "attention.query attention.key attention.value"},
        copies={"output.weight": "token_embd.weight"},
    ),
    "llama": Layout(
        {"token_embd": "token_embedding", "output_norm": "final_norm", "output": "head"},
        {
            **_GGUF_ATTENTION,
            "blk.{}.attn_q": "attention.query",
            "blk.{}.attn_k": "attention.key",
            "blk.{}.attn_v": "attention.value",
            "blk.{}.ffn_gate": "feed_forward.gate",
        },
        interleaved=True,
        ignored=("rope_freqs.weight",),
    ),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of theirs, and the parameters of ours that it holds."""

    name: str
    shape: Shape
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    """Of each part, along its first dim."""
    transposed: bool
    heads: tuple[int, ...]
    """Of each part, the number of heads whose rotary pairs are interleaved, or 0."""


def stored_tensors(config: ModelConfig, layout: Layout, *, vocab_size: int) -> list[StoredTensor]:
    """Their tensors for a decoder, in its order; nothing is built but names and shapes."""
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size=vocab_size)
    shapes: dict[str, Shape] = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    modules = dict(layout.outside)
    for number in range(config.n_layers):
        for theirs, ours in layout.inside.items():
            full = " ".join(f"blocks.{number}.{name}" for name in ours.split())
            modules[theirs.format(number)] = full
    heads = {"query": config.n_heads, "key": config.kv_heads} if layout.interleaved else {}
    found = []
    for theirs, ours in modules.items():
        for kind in ("weight", "bias"):
            parts = tuple(f"{name}.{kind}" for name in ours.split())
            if parts[0] not in shapes:
                continue
            rows = tuple(shapes[part][0] for part in parts)
            shape = (sum(rows), *shapes[parts[0]][1:])
            turned = layout.transposed and len(shape) == 2 and parts[0].startswith("blocks.")
            found.append(
                StoredTensor(
                    f"{theirs}.{kind}",
                    shape[::-1] if turned else shape,
                    parts,
                    rows,
                    turned,
                    tuple(heads.get(part.split(".")[-2], 0) for part in parts),
                )
            )
    missing = shapes.keys() - {part for stored in found for part in stored.parts}
    if missing:
        raise FormatError(f"the format has no place for {', '.join(sorted(missing))}")
    return found


def leave(name: str, values: Tensor) -> None:
    """Of no use for what a file holds."""


def to_stored(stored: StoredTensor, read: Read) -> Tensor:
    """Their tensor from our parameters."""
    parts = [
        interleave(read(part), n_heads) if n_heads else read(part)
        for part, n_heads in zip(stored.parts, stored.heads, strict=True)
    ]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.T.contiguous() if stored.transposed else whole


def to_parameters(tensors: list[StoredTensor], read: Read) -> Iterator[tuple[str, Tensor]]:
    """Our parameters by name, in float32, from a reader of their tensors; each is read once."""
    for stored in tensors:
        whole = read(stored.name).float()
        whole = whole.T if stored.transposed else whole
        for part, values, n_heads in zip(
            stored.parts, torch.split(whole, list(stored.rows)), stored.heads, strict=True
        ):
            yield part, (deinterleave(values, n_heads) if n_heads else values).contiguous()


def match_tensors(
    tensors: list[StoredTensor], found: Mapping[str, Shape], *, layout: Layout, what: str
) -> dict[str, str]:
    """The name in the file of each tensor that is expected, and of copies. FormatError with
    everything that is missing, too much, or in another shape."""
    names: dict[str, str] = {}
    differences = []
    for stored in tensors:
        spellings = [stored.name, *(stored.name.removeprefix(p) for p in layout.prefixes)]
        there = next((name for name in spellings if name in found), None)
        if there is None:
            differences.append(f"{stored.name} {list(stored.shape)} is missing")
            continue
        names[stored.name] = there
        if tuple(found[there]) != stored.shape:
            differences.append(f"{there} is {list(found[there])}, not {list(stored.shape)}")
    for name in sorted(found.keys() - set(names.values())):
        if name in layout.copies:
            names[name] = name
        elif not _is_ignored(name, layout):
            differences.append(f"{name:.200} {list(found[name])} has no place in this model")
    if differences:
        more = len(differences) - _MOST_DIFFERENCES
        listed = "; ".join(differences[:_MOST_DIFFERENCES]) + (f"; and {more} more" * (more > 0))
        raise FormatError(f"{what} does not hold the model that it describes: {listed}")
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
