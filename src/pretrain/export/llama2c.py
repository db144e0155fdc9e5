"""Models of llama2.c (Andrej Karpathy, 2023): a .bin of float32 weights, and a .bin of pieces.

The first version of the format: seven int32 (width, feed-forward, layers, heads, key/value heads,
vocabulary, context), then the tensors one after the other, each kind for all layers. A file must
have exactly the length that follows from these seven, else it is a FormatError.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.export.families import checked_config
from pretrain.export.layouts import FormatError, ImportedModel, Layout, stored_tensors
from pretrain.model.config import n_parameters
from pretrain.model.families import FAMILIES
from pretrain.tokenizer.encode import SPACE
from pretrain.tokenizer.load import Piece, PieceType, bpe_from_pieces
from pretrain.tokenizer.tokenizer import Tokenizer

_HEADER = struct.Struct("<7i")
_VERSIONED = 0x616B3432  # "ak42", the magic number of later versions
_LAYOUT = Layout(own_prefix="", interleaved=True)
# Each is stored for all layers before the next one.
_ORDER = (
    "token_embedding attention_norm attention.query attention.key attention.value attention.output "
    "feed_forward_norm feed_forward.gate feed_forward.down feed_forward.up final_norm head"
).split()
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
    sizes = {"n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads, "d_model": d, "d_ff": f}
    values = {**FAMILIES["llama"], **sizes, "context_length": context, "tied_head": vocab > 0}
    try:
        config = checked_config(values)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from None
    vocab_size = abs(vocab)
    # Two tables of rotary angles (T, E/2) follow the final norm; we compute them ourselves.
    n_angles = context * config.d_head
    n_bytes = _HEADER.size + 4 * (n_parameters(config, vocab_size=vocab_size) + n_angles)
    if file.stat().st_size != n_bytes:
        raise FormatError(
            f"{file} must have {n_bytes:,} bytes for {layers} layers of {d} and a vocabulary of "
            f"{vocab_size} (got {file.stat().st_size:,})"
        )
    tokenizer_files = [tokenizer] if tokenizer else sorted(file.parent.glob("tok*.bin"))
    if len(tokenizer_files) != 1:
        raise FormatError(
            f"the folder of {file} must have one file tok*.bin (got {len(tokenizer_files)}); name "
            "the model's tokenizer with --tokenizer"
        )
    vocabulary = read_pieces(tokenizer_files[0])
    if vocabulary.vocab_size != vocab_size:
        # A file truncated between two pieces looks complete.
        raise FormatError(
            f"{tokenizer_files[0]} must have {vocab_size:,} pieces, the vocabulary size of {file} "
            f"(got {vocabulary.vocab_size:,})"
        )
    tensors = stored_tensors(config, _LAYOUT, vocab_size=vocab_size)
    tensors.sort(key=lambda t: next(i for i, n in enumerate(_ORDER) if f"{n}.weight" in t.name))
    places, offset = {}, _HEADER.size
    for tensor in tensors:
        places[tensor.name] = offset, tensor.shape
        n_after = n_angles if tensor.name == "final_norm.weight" else 0
        offset += 4 * (math.prod(tensor.shape) + n_after)

    def read(name: str) -> Tensor:
        offset, shape = places[name]
        numbers = np.fromfile(file, "<f4", math.prod(shape), offset=offset)
        return torch.from_numpy(numbers).view(shape)

    files = (file, tokenizer_files[0])
    return ImportedModel("llama2.c", files, config, vocabulary, tensors, read)


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
                raise ValueError(f"{length} bytes of text must follow (got {len(raw)})")
            text = raw.decode()
        except (struct.error, ValueError) as error:
            raise FormatError(
                f"{file} must have a complete piece of llama2.c at byte {place}: {error}"
            ) from None
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
