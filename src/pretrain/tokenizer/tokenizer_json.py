"""The contents of a tokenizer.json: its kind, its special tokens, and its BOS template.

A vocabulary that lacks bytes, contradicts itself, or changes text before encoding it is a
ValueError, because text would be lost.

Programs other than this one put the tokens of the template (`post_processor`) around each text.
Here the reader of a text decides: start-of-text comes before documents, evaluated texts and, unless
an imported model does without, prompts. So the template of a file is removed when a tokenizer is
created from it, and an exported file gets one with just that token. Neither changes the ids of the
text itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pretrain.tokenizer.byte_level import byte_symbols
from pretrain.tokenizer.sentencepiece import SPACE, space_prefix

if TYPE_CHECKING:
    import tokenizers

Kind = Literal["bpe", "gpt", "characters", "bytes"]

END_OF_TEXT = "<|endoftext|>"
START_OF_TEXT = {"<|end_of_text|>": "<|begin_of_text|>", "</s>": "<s>"}
"""The start-of-text token by end-of-text token: of Llama 3, and of Llama 1 and 2."""
END_OF_WORD = "</w>"
"""Suffix of the tokens of GPT (2018) that end a word."""
OPTIONAL_BYTES = {
    **{byte: f"\\x{byte:02x}" for byte in (*range(0x20), 0x7F) if byte not in b"\t\n\r"},
    0xF1: "\\U00040000-\\U0007ffff",
    0xF2: "\\U00080000-\\U000bffff",
}
"""Bytes that a vocabulary may lack, as SmolLM's does: control characters, and the first bytes of
empty planes of Unicode. A text with them cannot be encoded. For each byte its characters, as in a
character class of a regular expression."""
_NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


def token_list(library: tokenizers.Tokenizer) -> list[str]:
    """The tokens of a vocabulary by id; ValueError if ids are missing or used twice."""
    vocabulary = library.get_vocab(with_added_tokens=True)
    token_of = {id_: token for token, id_ in vocabulary.items()}
    if len(token_of) < len(vocabulary):
        raise ValueError(f"the vocabulary of {len(vocabulary)} tokens has two tokens with one id")
    for id_ in range(len(token_of)):
        if id_ not in token_of:
            raise ValueError(
                f"the vocabulary of {len(vocabulary)} tokens has holes: id {id_} is missing"
            )
    return [token_of[id_] for id_ in range(len(token_of))]


def special_ids(description: Mapping[str, Any]) -> set[int]:
    """Ids of the special tokens, to which no text is encoded."""
    return {token["id"] for token in description.get("added_tokens", ()) if token.get("special")}


def end_of_text_id(tokens: list[str], special: set[int]) -> int:
    """Id of the special token that ends a document; ValueError if it does not exist."""
    for name in (END_OF_TEXT, *START_OF_TEXT):
        if name in tokens and tokens.index(name) in special:
            return tokens.index(name)
    raise ValueError(f"the tokenizer has no special token {END_OF_TEXT!r} to end a document with")


def kind_of(description: Mapping[str, Any], tokens: list[str], special: set[int]) -> Kind:
    """Return the kind of a tokenizer.json; ValueError for one under which text would be lost."""
    model = description["model"]
    if "" in tokens:
        raise ValueError("the tokenizer has an empty token, which could be merged without end")
    if model.get("dropout"):
        raise ValueError("the tokenizer has dropout, so a text would get other ids each time")
    is_gpt = is_gpt_2018(description)
    if model.get("continuing_subword_prefix") or (model.get("end_of_word_suffix") and not is_gpt):
        raise ValueError(
            "the tokenizer marks the inside or the end of words; it must be byte-level BPE"
        )
    if is_gpt:
        return "gpt"

    if description.get("normalizer") is not None and space_prefix(description) is None:
        raise ValueError(
            "the tokenizer has a normalizer, which changes text before it is encoded; it must have "
            "none"
        )
    for token in description.get("added_tokens", ()):
        if not token.get("special") and any(map(token.get, ("lstrip", "rstrip", "single_word"))):
            raise ValueError(
                f"the token {token['content']!r:.60} removes spaces around it; lstrip, rstrip and "
                "single_word must be false"
            )

    ordinary = [token for id_, token in enumerate(tokens) if id_ not in special]
    if model.get("type") == "WordLevel":
        if not ordinary or any(len(token) != 1 for token in ordinary):
            raise ValueError(
                "the tokenizer is a list of words; it must be byte-level BPE or single characters"
            )
        return "characters"
    if space_prefix(description) is not None:
        _check_sentencepiece(ordinary)
        return "bpe"
    if model.get("type") != "BPE" or '"ByteLevel"' not in json.dumps(description["pre_tokenizer"]):
        raise ValueError(
            f"the tokenizer's type is {model.get('type')}; it must be byte-level BPE or single "
            "characters"
        )

    missing = missing_bytes(tokens, special)
    required = missing - OPTIONAL_BYTES.keys()
    if required:
        raise ValueError(
            f"the vocabulary lacks {len(missing)} of the 256 bytes (the first is "
            f"0x{min(required):02X}): text with them would be lost"
        )
    has_gpt2_split = (
        description["pre_tokenizer"].items()
        >= {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "use_regex": True,
        }.items()
    )
    is_all_special = all(token.get("special") for token in description.get("added_tokens", ()))
    if has_gpt2_split and is_all_special and not model.get("merges") and len(ordinary) == 256:
        return "bytes"
    return "bpe"


def _check_sentencepiece(tokens: list[str]) -> None:
    for byte in range(256):
        if f"<0x{byte:02X}>" not in tokens:
            raise ValueError(f"the tokenizer lacks the token <0x{byte:02X}>: text would be lost")
    for token in tokens:
        if SPACE in token.lstrip(SPACE):  # a long text could not be split at its spaces
            raise ValueError(f"the token {token!r:.60} has a space inside; none may have")


def missing_bytes(tokens: list[str], special: set[int]) -> frozenset[int]:
    """Bytes that can occur in UTF-8 and are not a token of a byte-level vocabulary."""
    ordinary = {token for id_, token in enumerate(tokens) if id_ not in special}
    missing = {byte for byte, symbol in enumerate(byte_symbols()) if symbol not in ordinary}
    return frozenset(missing) - _NEVER_IN_UTF8


def is_gpt_2018(description: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is GPT's of 2018."""
    normalizer, model = description.get("normalizer") or {}, description["model"]
    return (
        normalizer.get("type") == "BertNormalizer"
        and model.get("type") == "BPE"
        and model.get("end_of_word_suffix") == END_OF_WORD
    )


# The BOS template


def without_template(description: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer.json, which adds nothing to a text."""
    # The ByteLevel post-processor adds no ids: it computes the offsets of tokens in the text.
    kept = [step for step in _post_processors(description) if step["type"] == "ByteLevel"]
    return {**description, "post_processor": kept[0] if kept else None}


def template_adds_bos(description: Mapping[str, Any]) -> bool:
    """Whether other programs put a special token before a text."""
    templates = [step["single"] for step in _post_processors(description) if "single" in step]
    return any("SpecialToken" in template[0] for template in templates if template)


def with_bos_template(
    description: Mapping[str, Any], *, bos_token: str, id_: int
) -> dict[str, Any]:
    """The same tokenizer.json, which puts the special token `bos_token` before each text."""
    special = {"SpecialToken": {"id": bos_token, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    template = {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {bos_token: {"id": bos_token, "ids": [id_], "tokens": [bos_token]}},
    }
    kept = without_template(description)["post_processor"]
    both = {"type": "Sequence", "processors": [kept, template]} if kept else template
    return {**description, "post_processor": both}


def _post_processors(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = description.get("post_processor")
    steps = given["processors"] if given and given["type"] == "Sequence" else [given]
    return [step for step in steps if step]
