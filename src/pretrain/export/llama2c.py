"""Models of llama2.c (Andrej Karpathy, 2023): a .bin of float32 weights, and a .bin of pieces.

The first version of the format: seven int32 (width, feed-forward, layers, heads, key/value heads,
vocabulary, context), then the tensors one after the other, each kind for all layers. A file must
have exactly the length that follows from these seven, else it is a FormatError.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.export.imported import ImportedModel, finite
from pretrain.export.layouts import FormatError, Shape, deinterleave
from pretrain.model.config import ModelConfig
from pretrain.model.families import llama
from pretrain.tokenizer.sentencepiece import SPACE, Piece, PieceType, bpe_from_pieces
from pretrain.tokenizer.tokenizer import Tokenizer

_HEADER = struct.Struct("<7i")
_VERSIONED = 0x616B3432  # "ak42", the magic number of later versions
_N_SPECIAL = 3
_MAX_PIECES = 1 << 20
_MAX_PIECE_BYTES = 1 << 16


def is_llama2c(file: Path) -> bool:
    """Whether a file starts with seven plausible sizes."""
    with open(file, "rb") as opened:
        data = opened.read(_HEADER.size)
    if len(data) < _HEADER.size:
        return False
    d, f, layers, heads, kv_heads, vocab, context = _HEADER.unpack(data)
    return bool(d == _VERSIONED) or (
        0 < layers < 10_000
        and 0 < kv_heads <= heads <= d < 1 << 20
        and 0 < f < 1 << 24
        and 0 < abs(vocab) < 1 << 24
        and 0 < context < 1 << 24
    )


def open_llama2c(file: Path, tokenizer: Path | None = None) -> ImportedModel:
    """Open a model file with its `tokenizer`, or else with the one tok*.bin in its folder."""
    with open(file, "rb") as opened:
        d, f, layers, heads, kv_heads, vocab, context = _HEADER.unpack(opened.read(_HEADER.size))
    if d == _VERSIONED:
        raise FormatError(
            f"{file} must have the first version of llama2.c's format (got a later one)"
        )
    try:
        config = ModelConfig(
            **llama(
                n_layers=layers,
                n_heads=heads,
                n_kv_heads=kv_heads,
                d_model=d,
                d_ff=f,
                context_length=context,
                tied_head=vocab > 0,
            )
        )
    except ValueError as error:
        raise FormatError(f"{file}: {error}") from None
    places, end = _places(config, abs(vocab))
    n_bytes = file.stat().st_size
    if n_bytes != end:
        raise FormatError(
            f"{file} must have {end:,} bytes for {config.n_layers} layers of {config.d_model} and "
            f"a vocabulary of {abs(vocab)} (got {n_bytes:,})"
        )
    tokenizer_file = tokenizer or _tokenizer_file(file)

    def parameters() -> Iterator[tuple[str, Tensor]]:
        for name, (offset, shape) in places.items():
            numbers = np.fromfile(file, "<f4", math.prod(shape), offset=offset)
            values = torch.from_numpy(numbers).view(shape)
            n_heads = {"query": config.n_heads, "key": config.kv_heads}.get(name.split(".")[-2], 0)
            finite(name, values)
            yield name, deinterleave(values, n_heads) if n_heads else values

    read = read_pieces(tokenizer_file)
    if read.vocab_size != abs(vocab):
        # A file truncated between two pieces looks complete.
        raise FormatError(
            f"{tokenizer_file} must have {abs(vocab):,} pieces, the vocabulary size of {file} (got "
            f"{read.vocab_size:,})"
        )
    return ImportedModel("llama2.c", (file, tokenizer_file), config, read, parameters)


def _places(config: ModelConfig, vocab_size: int) -> tuple[dict[str, tuple[int, Shape]], int]:
    """Offset in bytes and shape of each parameter, and the length of the file."""
    d, f, d_kv = config.d_model, config.feed_forward_width, config.kv_heads * config.d_head
    blocks: list[tuple[str, Shape]] = [
        ("attention_norm", (d,)),
        ("attention.query", (d, d)),
        ("attention.key", (d_kv, d)),
        ("attention.value", (d_kv, d)),
        ("attention.output", (d, d)),
        ("feed_forward_norm", (d,)),
        ("feed_forward.gate", (f, d)),
        ("feed_forward.down", (d, f)),
        ("feed_forward.up", (f, d)),
    ]
    order: list[tuple[str, Shape]] = [("token_embedding.weight", (vocab_size, d))]
    for name, shape in blocks:
        order += [(f"blocks.{i}.{name}.weight", shape) for i in range(config.n_layers)]
    order.append(("final_norm.weight", (d,)))
    # Two tables of rotary angles follow, which we compute ourselves.
    order.append(("", (2, config.window_tokens, config.d_head // 2)))
    if not config.tied_head:
        order.append(("head.weight", (vocab_size, d)))
    places, offset = {}, _HEADER.size
    for name, shape in order:
        if name:
            places[name] = (offset, shape)
        offset += 4 * math.prod(shape)
    return places, offset


def _tokenizer_file(file: Path) -> Path:
    candidates = sorted(file.parent.glob("tok*.bin"))
    if len(candidates) != 1:
        raise FormatError(
            f"the folder of {file} has {len(candidates)} files tok*.bin; name its tokenizer "
            "(--tokenizer)"
        )
    return candidates[0]


def read_pieces(file: Path) -> Tokenizer:
    """The tokenizer in a .bin: the longest piece's length, then score, length and bytes of each."""
    data = file.read_bytes()
    place = 4
    pieces: list[Piece] = []
    while place < len(data) and len(pieces) < _MAX_PIECES:
        try:
            score, length = struct.unpack_from("<fi", data, place)
            raw = data[place + 8 : place + 8 + length]
            if not 0 < length <= _MAX_PIECE_BYTES or len(raw) < length:
                raise ValueError("it is truncated")
            text = raw.decode()
        except (struct.error, ValueError) as error:
            raise FormatError(f"{file}, byte {place}: not a piece of llama2.c: {error}") from None
        place += 8 + length
        pieces.append((text.replace(" ", SPACE), score, PieceType.NORMAL))
    if len(pieces) < _N_SPECIAL + 256:
        raise FormatError(f"{file} must have a piece for each byte (got {len(pieces)} pieces)")
    pieces[0] = ("<unk>", 0.0, PieceType.UNKNOWN)
    pieces[1], pieces[2] = ("<s>", 0.0, PieceType.CONTROL), ("</s>", 0.0, PieceType.CONTROL)
    for byte in range(256):
        pieces[_N_SPECIAL + byte] = (f"<0x{byte:02X}>", 0.0, PieceType.BYTE)
    try:
        return Tokenizer(bpe_from_pieces(pieces, has_prefix=True))
    except ValueError as error:
        raise FormatError(f"{file}: {error}") from None
