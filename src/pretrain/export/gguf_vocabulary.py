"""A tokenizer <-> the vocabulary inside a GGUF file.

Byte-level BPE is llama.cpp's type `gpt2` with the name of a pre-split, SentencePiece its type
`llama`. An unknown pre-split is a FormatError, because text would get other ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.export.layouts import FormatError, valid_stop_ids
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
        names: dict[Any, str] = {known: name for name, known in reversed(_SPLITS.items())}
        split, whole_words = tokenizer.split, bool(description["model"].get("ignore_merges"))
        name = names.get((split, whole_words)) or names.get((split, not whole_words))
        if name is None:
            known_splits = ", ".join(dict.fromkeys(split for split, _ in _SPLITS.values()))
            raise ValueError(
                f"the pre-split for llama.cpp must be one of {known_splits} (got "
                f"{split or 'another'}); --format hf takes any tokenizer"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(entries)
    writer.add_token_types([kinds.get(entry, PieceType.NORMAL) for entry in entries])
    writer.add_bos_token_id(tokenizer.start_of_text)
    writer.add_eos_token_id(tokenizer.stop_ids[0])
    # Every document in our training text starts with this token.
    writer.add_add_bos_token(tokenizer.add_bos)


def read_vocabulary(values: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a file's key-value pairs. FormatError if it cannot be represented here."""
    tokens, kinds = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise FormatError("tokenizer.ggml.tokens must be a list of texts")
    kinds = kinds if isinstance(kinds, list) else [PieceType.NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or len(set(tokens)) < len(tokens):
        raise FormatError(
            "tokenizer.ggml.tokens must be different, and tokenizer.ggml.token_type as many (got "
            f"{len(tokens):,}, of which {len(set(tokens)):,} are different, and {len(kinds):,})"
        )
    model, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if model not in ("gpt2", "llama"):
        raise FormatError(f"tokenizer.ggml.model must be gpt2 or llama (got {model!r:.60})")
    split, whole_words = _SPLITS.get(str(pre), (None, False))
    try:
        if model == "llama":
            scores = values.get("tokenizer.ggml.scores")
            if not isinstance(scores, list) or len(scores) != len(tokens):
                raise FormatError("tokenizer.ggml.scores must have a number for each token")
            pieces = list(zip(tokens, map(float, scores), map(int, kinds), strict=True))
            has_prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
            tokenizer = Tokenizer(bpe_from_pieces(pieces, has_prefix=has_prefix))
        else:
            if split is None:
                raise FormatError(
                    f"tokenizer.ggml.pre must be one of {', '.join(_SPLITS)} (got {pre!r:.60}): "
                    "another pre-split would give text other ids"
                )
            merges = [tuple(merge.split(" ")) for merge in values.get("tokenizer.ggml.merges", [])]
            if any(len(merge) != 2 for merge in merges):
                raise FormatError("each of tokenizer.ggml.merges must be two tokens and a space")
            kind_of = dict(zip(tokens, kinds, strict=True))
            ids = {token: id_ for id_, token in enumerate(tokens)}
            library_tokenizer = byte_level_bpe(
                {token: id_ for token, id_ in ids.items() if kind_of[token] == PieceType.NORMAL},
                merges,
                split=split,
                added={t: id_ for t, id_ in ids.items() if kind_of[t] != PieceType.NORMAL},
                non_special={t for t in tokens if kind_of[t] == PieceType.USER_DEFINED},
                ignore_merges=whole_words,
            )
            tokenizer = Tokenizer(library_tokenizer)
    except BaseException as error:
        # The library raises bare Exceptions, and its PanicException is only a BaseException.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise FormatError(f"the tokenizer cannot be used: {error!s:.300}") from None
    # What the file does not have is as llama.cpp has it for this vocabulary.
    add_bos = values.get("tokenizer.ggml.add_bos_token", model == "llama" or split == "llama3")
    tokenizer.add_bos = add_bos is True
    tokenizer.stop_ids = valid_stop_ids(tokenizer, values.get("tokenizer.ggml.eos_token_id"))
    return tokenizer
