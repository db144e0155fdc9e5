"""SentencePiece's .model files, as of Llama 1 and 2 -> a library tokenizer.

The file is a protocol buffer of which four fields matter; they are read here, without the package.
Taken are BPE models that fall back to bytes and leave the text as it is; a model that normalizes
text, or of another kind, is a ValueError that says so. Source: Kudo and Richardson, "SentencePiece:
A simple and language independent subword tokenizer", 2018.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
"""What stands for a space in the vocabulary."""

_BPE = 2


class PieceType(IntEnum):
    """What an entry of the vocabulary is; the numbers are those of SentencePiece's files."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


Piece = tuple[str, float, int]
"""Text, score and kind of an entry."""


def read_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a .model file."""
    try:
        message = _fields(file.read_bytes())
        pieces = [_piece(value) for number, value in message if number == 1]
        trainer = dict(_fields(_last(message, 2)))
        normalizer = dict(_fields(_last(message, 3)))
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"is no SentencePiece model: {error}") from None
    n_bytes = sum(kind == PieceType.BYTE for _, _, kind in pieces)
    if trainer.get(3, 1) != _BPE or n_bytes != 256:
        raise ValueError(
            f"legal are BPE models with an entry for each of the 256 bytes; this one is "
            f"{'BPE' if trainer.get(3, 1) == _BPE else 'not BPE'} and has {n_bytes}"
        )
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1):
        raise ValueError(
            "the model changes the text before it is encoded (its normalizer is not "
            " 'identity', or it removes spaces), so text would be lost"
        )
    return bpe_from_pieces(pieces, has_prefix=bool(normalizer.get(3, 1)))


def bpe_from_pieces(pieces: list[Piece], *, has_prefix: bool) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary by id. With `has_prefix` a text is read as if a space stood
    before it. Raises ValueError for a vocabulary that contradicts itself."""
    texts = [text for text, _, _ in pieces]
    if len(set(texts)) < len(texts) or not texts:
        raise ValueError("the vocabulary is empty, or holds an entry twice")
    defined = next((text for text, _, kind in pieces if kind == PieceType.USER_DEFINED), None)
    if defined is not None:
        raise ValueError(f"the entry {defined!r:.60} is user-defined; legal: none is")
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Library

    vocabulary = {text: id_ for id_, (text, _, _) in enumerate(pieces)}
    unknown = [text for text, _, kind in pieces if kind == PieceType.UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"{len(unknown)} entries stand for what is unknown; legal: 1")
    # A merge makes the piece of the highest score, whatever its parts.
    merges = [
        (text[:cut], text[cut:])
        for text, _, kind in sorted(pieces, key=lambda piece: -piece[1])
        if kind == PieceType.NORMAL
        for cut in sorted(
            (c for c in range(1, len(text)) if text[:c] in vocabulary and text[c:] in vocabulary),
            key=lambda c: (vocabulary[text[:c]], vocabulary[text[c:]]),
        )
    ]
    library = Library(
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
            for text, _, kind in pieces
            if kind in (PieceType.UNKNOWN, PieceType.CONTROL)
        ]
    )
    return library


def space_prefix(description: Mapping[str, Any]) -> str | None:
    """What such a tokenizer.json puts before a text whose spaces it has replaced: a space or
    nothing; None for one of another kind."""
    normalizer, model = description.get("normalizer"), description["model"]
    if not normalizer or model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    parts = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if description.get("pre_tokenizer") or parts not in ([prepend, replace], [replace]):
        return None
    return SPACE if prepend in parts else ""


def _piece(data: bytes | int) -> Piece:
    found = dict(_fields(data))
    text, score = found[1], found.get(2, b"\0\0\0\0")
    assert isinstance(text, bytes)
    assert isinstance(score, bytes)
    kind = found.get(3, PieceType.NORMAL)
    return text.decode(), struct.unpack("<f", score)[0], int(kind)


def _last(message: list[tuple[int, bytes | int]], wanted: int) -> bytes | int:
    return [value for number, value in message if number == wanted][-1]


def _fields(data: bytes | int) -> list[tuple[int, bytes | int]]:
    """Number and value of each field of a message of the wire format of protocol buffers: whole
    numbers as they are, everything else as its bytes."""
    return list(_walk(data)) if isinstance(data, bytes) else []


def _walk(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 2: -1, 5: 4}[key & 7]
        size = number() if size < 0 else size
        if place + size > len(data):
            raise IndexError("it is cut off")
        yield key >> 3, data[place : place + size]
        place += size
