"""A tokenizer <-> the vocabulary inside a GGUF file.

Byte-level BPE is llama.cpp's type `gpt2` with the name of a pre-split, SentencePiece its type
`llama`. An unknown pre-split is a FormatError, because text would get other ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.export.imported import valid_stop_ids
from pretrain.export.layouts import FormatError
from pretrain.tokenizer.byte_level import Split, byte_level_bpe
from pretrain.tokenizer.sentencepiece import PieceType, bpe_from_pieces
from pretrain.tokenizer.tokenizer import Tokenizer

# llama.cpp's name of a pre-split -> ours, and whether a word in the vocabulary is one token at once
# (ignore_merges).
_SPLITS: dict[str, tuple[Split, bool]] = {
    "gpt-2": ("gpt2", False),
    "dbrx": ("llama3", False),
    "llama-bpe": ("llama3", True),
    "llama3": ("llama3", True),
    "llama-v3": ("llama3", True),
    "gpt-4o": ("o200k", False),
    "smollm": ("smollm", False),
}


def write_vocabulary(writer: Any, tokenizer: Tokenizer) -> None:
    """Add tokens, kinds, merges or scores, and special ids to a GGUFWriter."""
    description = tokenizer.description
    entries = [tokenizer.id_to_token(id_) for id_ in range(tokenizer.vocab_size)]
    kinds = {
        token["content"]: PieceType.CONTROL if token["special"] else PieceType.USER_DEFINED
        for token in description["added_tokens"]
    }
    merges = [tuple(merge) for merge in description["model"]["merges"]]
    if tokenizer.space_prefix is not None:
        kinds |= {f"<0x{byte:02X}>": PieceType.BYTE for byte in range(256)}
        kinds[description["model"]["unk_token"]] = PieceType.UNKNOWN
        # A token that is merged earlier has a higher score; one that is never merged needs none.
        first = {left + right: n for n, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(first.get(entry, 0)) for entry in entries])
        writer.add_add_space_prefix(bool(tokenizer.space_prefix))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_of_split(tokenizer))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(entries)
    writer.add_token_types([kinds.get(entry, PieceType.NORMAL) for entry in entries])
    writer.add_bos_token_id(tokenizer.start_of_text)
    writer.add_eos_token_id(tokenizer.stop_ids[0])
    # Every document in our training text starts with this token.
    writer.add_add_bos_token(tokenizer.add_bos)


def _name_of_split(tokenizer: Tokenizer) -> str:
    whole_words = bool(tokenizer.description["model"].get("ignore_merges"))
    split = tokenizer.split
    for candidate in ((split, whole_words), (split, not whole_words)):
        for name, known in _SPLITS.items():
            if known == candidate:
                return name
    known_splits = ", ".join(dict.fromkeys(split for split, _ in _SPLITS.values()))
    raise ValueError(
        f"the pre-split for llama.cpp must be one of {known_splits} (got {split or 'another'})"
    )


def read_vocabulary(values: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a file's key-value pairs. FormatError if it cannot be represented here."""
    tokens, kinds = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise FormatError("the file has no vocabulary")
    kinds = kinds if isinstance(kinds, list) else [PieceType.NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or len(set(tokens)) < len(tokens):
        raise FormatError("the vocabulary has a duplicate token, or not a type for each token")
    model = values.get("tokenizer.ggml.model")
    try:
        if model == "llama":
            scores = values.get("tokenizer.ggml.scores")
            if not isinstance(scores, list) or len(scores) != len(tokens):
                raise FormatError("the vocabulary has no scores")
            pieces = list(zip(tokens, map(float, scores), map(int, kinds), strict=True))
            has_prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
            return _with_settings(Tokenizer(bpe_from_pieces(pieces, has_prefix=has_prefix)), values)
        if model == "gpt2":
            return _with_settings(Tokenizer(_byte_level(values, tokens, kinds)), values)
    except BaseException as error:
        # The library raises bare Exceptions, and its PanicException is only a BaseException.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise FormatError(f"the tokenizer cannot be used: {error!s:.300}") from None
    raise FormatError(f"the type of the tokenizer must be gpt2 or llama (got {model!r:.60})")


def _with_settings(tokenizer: Tokenizer, values: Mapping[str, Any]) -> Tokenizer:
    """Set the stop ids and add_bos from the file, else as llama.cpp does for this vocabulary."""
    split = _SPLITS.get(values.get("tokenizer.ggml.pre", ""), ("",))[0]
    default = values["tokenizer.ggml.model"] == "llama" or split == "llama3"
    tokenizer.add_bos = values.get("tokenizer.ggml.add_bos_token", default) is True
    tokenizer.stop_ids = valid_stop_ids(tokenizer, values.get("tokenizer.ggml.eos_token_id"))
    return tokenizer


def _byte_level(values: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> Any:
    name = values.get("tokenizer.ggml.pre")
    if name not in _SPLITS:
        raise FormatError(f"the pre-split must be one of {', '.join(_SPLITS)} (got {name!r:.60})")
    split, whole_words = _SPLITS[name]
    merges = [tuple(merge.split(" ")) for merge in values.get("tokenizer.ggml.merges", [])]
    if any(len(merge) != 2 for merge in merges):
        raise FormatError("a merge must be of two tokens")
    added = {
        token: id_
        for id_, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != PieceType.NORMAL
    }
    plain = {token: id_ for id_, token in enumerate(tokens) if token not in added}
    non_special = {name for name, id_ in added.items() if kinds[id_] == PieceType.USER_DEFINED}
    return byte_level_bpe(
        plain, merges, split=split, added=added, non_special=non_special, ignore_merges=whole_words
    )
