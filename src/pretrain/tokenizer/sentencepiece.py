"""SentencePiece's .model files, as of Llama 1 and 2 -> a library tokenizer.

Accepted are BPE models with byte fallback that leave the text as it is; a model that normalizes
text, or of another type, is a ValueError. The package `sentencepiece` parses the file. Source: Kudo
and Richardson, "SentencePiece: A simple and language independent subword tokenizer", 2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers

from pretrain import missing_package
from pretrain.tokenizer.byte_level import merges_of, special_token

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


def read_sentencepiece(content: bytes) -> LibraryTokenizer:
    """Read the content of a .model file."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        feature = "a SentencePiece model"
        raise missing_package(feature, "sentencepiece", extra="sentencepiece") from error
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    except (DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the file must be a SentencePiece model: {error}") from None
    is_bpe = model.trainer_spec.model_type == _BPE
    n_bytes = sum(type_ == PieceType.BYTE for _, _, type_ in pieces)
    if not is_bpe or n_bytes != 256:
        raise ValueError(
            "the model must be BPE with a token for each of the 256 bytes; this one is "
            f"{'BPE' if is_bpe else 'not BPE'} and has {n_bytes}"
        )
    normalizer = model.normalizer_spec
    removes_spaces = normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces
    if normalizer.precompiled_charsmap or removes_spaces:
        raise ValueError(
            "the model changes the text before it is encoded, so text would be lost; its "
            "normalizer must be 'identity' and keep all spaces"
        )
    return bpe_from_pieces(pieces, has_prefix=normalizer.add_dummy_prefix)


def bpe_from_pieces(pieces: list[Piece], *, has_prefix: bool) -> LibraryTokenizer:
    """Create a library tokenizer from pieces in the order of their ids.

    With `has_prefix` a text is encoded as if it started with a space. ValueError for a
    contradictory vocabulary.
    """
    vocabulary = {text: id_ for id_, (text, _, _) in enumerate(pieces)}
    if len(vocabulary) < len(pieces) or not pieces:
        raise ValueError(
            f"the vocabulary must have different tokens; of its {len(pieces)} tokens "
            f"{len(vocabulary)} are different"
        )
    for text, _, type_ in pieces:
        if type_ == PieceType.USER_DEFINED:
            raise ValueError(f"the token {text!r:.60} is user-defined; no token may be")
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
    special = (PieceType.UNKNOWN, PieceType.CONTROL)
    library.add_special_tokens([special_token(text) for text, _, t in pieces if t in special])
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
