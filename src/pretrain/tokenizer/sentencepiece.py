"""SentencePiece's .model files, as of Llama 1 and 2 -> a library tokenizer.

The file is a protocol buffer of which four fields are needed, so they are parsed here and the
package `sentencepiece` is not. Accepted are BPE models with byte fallback that leave the text as it
is; a model that normalizes text, or of another type, is a ValueError. Source: Kudo and Richardson,
"SentencePiece: A simple and language independent subword tokenizer", 2018.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.tokenizer.byte_level import merges_of

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
"""The character for a space in the vocabulary."""

_BPE = 2


class PieceType(IntEnum):
    """Type of a piece, with the numbers of SentencePiece's files."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


Piece = tuple[str, float, int]
"""Text, score and type of a token; SentencePiece calls its tokens pieces."""


def read_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    """Read the tokenizer of a .model file."""
    try:
        model = _parse_message(file.read_bytes())
        pieces = [_parse_piece(value) for number, value in model if number == 1]
        trainer = dict(_parse_message([value for number, value in model if number == 2][-1]))
        normalizer = dict(_parse_message([value for number, value in model if number == 3][-1]))
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"not a SentencePiece model: {error}") from None
    is_bpe = trainer.get(3, 1) == _BPE
    n_bytes = sum(type_ == PieceType.BYTE for _, _, type_ in pieces)
    if not is_bpe or n_bytes != 256:
        raise ValueError(
            "the model must be BPE with a token for each of the 256 bytes; this one is "
            f"{'BPE' if is_bpe else 'not BPE'} and has {n_bytes}"
        )
    normalizes = normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1)
    if normalizes:
        raise ValueError(
            "the model changes the text before it is encoded, so text would be lost; its "
            "normalizer must be 'identity' and keep all spaces"
        )
    return bpe_from_pieces(pieces, has_prefix=bool(normalizer.get(3, 1)))


def bpe_from_pieces(pieces: list[Piece], *, has_prefix: bool) -> tokenizers.Tokenizer:
    """Create a library tokenizer from pieces in the order of their ids.

    With `has_prefix` a text is encoded as if it started with a space. ValueError for a
    contradictory vocabulary.
    """
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as LibraryTokenizer

    vocabulary = {text: id_ for id_, (text, _, _) in enumerate(pieces)}
    if len(vocabulary) < len(pieces) or not pieces:
        raise ValueError("the vocabulary is empty, or has a duplicate token")
    for text, _, type_ in pieces:
        if type_ == PieceType.USER_DEFINED:
            raise ValueError(f"the token {text!r:.60} is user-defined; that is not supported")
    unknown = [text for text, _, type_ in pieces if type_ == PieceType.UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"the vocabulary must have 1 unknown token, not {len(unknown)}")

    by_score = sorted(pieces, key=lambda piece: -piece[1])
    normal = [text for text, _, type_ in by_score if type_ == PieceType.NORMAL]
    merges = merges_of(normal, vocabulary)
    library = LibraryTokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown[0], fuse_unk=True, byte_fallback=True)
    )
    prepend = [normalizers.Prepend(SPACE)] if has_prefix else []
    library.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    library.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    library.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, _, type_ in pieces
            if type_ in (PieceType.UNKNOWN, PieceType.CONTROL)
        ]
    )
    return library


def space_prefix(description: Mapping[str, Any]) -> str | None:
    """What a tokenizer.json written by `bpe_from_pieces` puts before a text: SPACE or nothing.

    None for a tokenizer.json of another kind.
    """
    normalizer, model = description.get("normalizer"), description["model"]
    if not normalizer or model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if description.get("pre_tokenizer") or steps not in ([prepend, replace], [replace]):
        return None
    return SPACE if prepend in steps else ""


# Protocol buffers


def _parse_piece(data: bytes | int) -> Piece:
    fields = dict(_parse_message(data))
    text, score = fields[1], fields.get(2, b"\0\0\0\0")
    assert isinstance(text, bytes)
    assert isinstance(score, bytes)
    type_ = fields.get(3, PieceType.NORMAL)
    return text.decode(), struct.unpack("<f", score)[0], int(type_)


def _parse_message(data: bytes | int) -> list[tuple[int, bytes | int]]:
    """Number and value of each field of a message: varints as integers, all others as bytes."""
    return list(_fields(data)) if isinstance(data, bytes) else []


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        key = varint()
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            yield number, varint()
            continue
        if wire_type == 2:
            size = varint()
        else:
            size = {1: 8, 5: 4}[wire_type]
        if position + size > len(data):
            raise IndexError("the file is truncated")
        yield number, data[position : position + size]
        position += size
