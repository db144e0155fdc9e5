"""What a library tokenizer must be so that no text is lost: its kind, its end-of-text, its bytes.

A description (tokenizer.json) and the entries by id come in; a vocabulary that lacks bytes,
contradicts itself, or changes text before encoding it is a ValueError that says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pretrain.tokenizer.byte_level import byte_symbols
from pretrain.tokenizer.sentencepiece import SPACE, space_prefix

Kind = Literal["bpe", "gpt", "characters", "bytes"]

END_OF_TEXT = "<|endoftext|>"
# Llama 3's, and that of Llama 1 and 2, which mark the start of a document too.
STARTS = {"<|end_of_text|>": "<|begin_of_text|>", "</s>": "<s>"}
# What a vocabulary may lack, as SmolLM's does: control characters, and the first bytes of planes of
# Unicode that are empty. A text with them is refused when it is encoded. Byte -> its characters, as
# a class of a regular expression spells them.
RARE = {
    **{byte: f"\\x{byte:02x}" for byte in (*range(0x20), 0x7F) if byte not in b"\t\n\r"},
    0xF1: "\\U00040000-\\U0007ffff",
    0xF2: "\\U00080000-\\U000bffff",
}
_NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


def end_of_text_of(entries: list[str], special: set[int]) -> int:
    """Id of the special token that ends a document. ValueError where there is none."""
    for name in (END_OF_TEXT, *STARTS):
        if name in entries and entries.index(name) in special:
            return entries.index(name)
    raise ValueError(f"tokenizer has no special token {END_OF_TEXT!r} to end a document with")


def kind_of(description: dict[str, Any], entries: list[str], special: set[int]) -> Kind:
    """The kind of a tokenizer.json. ValueError for one under which text would be lost."""
    model = description["model"]
    _refuse_contradictions(description, entries)
    if is_gpt(description):
        return "gpt"
    if description.get("normalizer") is not None and space_prefix(description) is None:
        raise ValueError(
            "tokenizer has a normalizer, which changes the text before it is encoded; legal: none"
        )
    for token in description.get("added_tokens", ()):
        if not token.get("special") and any(map(token.get, ("lstrip", "rstrip", "single_word"))):
            raise ValueError(f"the entry {token['content']!r:.60} takes spaces; legal: none does")
    plain = [entry for id_, entry in enumerate(entries) if id_ not in special]
    if model.get("type") == "WordLevel":
        if not plain or any(len(entry) != 1 for entry in plain):
            raise ValueError("tokenizer is a word list; legal: byte-level BPE or single characters")
        return "characters"
    if space_prefix(description) is not None:
        lacking = [b for b in range(256) if f"<0x{b:02X}>" not in plain]
        if lacking:
            raise ValueError(f"tokenizer lacks the entry <0x{lacking[0]:02X}>: text would be lost")
        across = next((entry for entry in plain if SPACE in entry.lstrip(SPACE)), None)
        if across is not None:  # a long text could not be cut at its spaces
            raise ValueError(f"the entry {across!r:.60} goes across a space; legal: none does")
        return "bpe"
    if model.get("type") != "BPE" or '"ByteLevel"' not in json.dumps(description["pre_tokenizer"]):
        raise ValueError(
            f"tokenizer is of type {model.get('type')}; legal: byte-level BPE or single characters"
        )
    missing = missing_bytes(entries, special)
    if missing - RARE.keys():
        raise ValueError(
            f"tokenizer vocabulary lacks {len(missing)} of the 256 bytes (the first is "
            f"0x{min(missing - RARE.keys()):02X}): text with them would be lost"
        )
    if _is_gpt2_split(description) and not model.get("merges") and len(plain) == 256:
        return "bytes"
    return "bpe"


def missing_bytes(entries: list[str], special: set[int]) -> frozenset[int]:
    """Bytes that may stand in a text and are no entry of a byte-level vocabulary."""
    plain = {entry for id_, entry in enumerate(entries) if id_ not in special}
    symbols = enumerate(byte_symbols())
    return frozenset(b for b, symbol in symbols if symbol not in plain) - _NEVER_IN_UTF8


def _refuse_contradictions(description: dict[str, Any], entries: list[str]) -> None:
    model = description["model"]
    if "" in entries:
        raise ValueError("tokenizer has an empty entry, which could be merged again and again")
    if model.get("dropout"):
        raise ValueError("tokenizer has dropout, so a text would have other ids each time")
    marks_ends = model.get("end_of_word_suffix") and not is_gpt(description)
    if model.get("continuing_subword_prefix") or marks_ends:
        raise ValueError("tokenizer marks the inside or the end of words; legal: byte-level BPE")


def _is_gpt2_split(description: dict[str, Any]) -> bool:
    split = description["pre_tokenizer"]
    return (
        split.get("type") == "ByteLevel"
        and split.get("add_prefix_space") is False
        and split.get("use_regex") is True
        and all(token.get("special") for token in description.get("added_tokens", ()))
    )


def without_template(description: Mapping[str, Any]) -> dict[str, Any]:
    """The same description, under which nothing is put around a text."""
    given = description.get("post_processor")
    parts = given["processors"] if given and given["type"] == "Sequence" else [given]
    # This one adds no ids; it says where in the text they come from.
    kept = [part for part in parts if part and part["type"] == "ByteLevel"]
    return {**description, "post_processor": kept[0] if kept else None}


def template_adds_bos(description: Mapping[str, Any]) -> bool:
    """Whether other programs put a special token before a text."""
    given = description.get("post_processor")
    parts = given["processors"] if given and given["type"] == "Sequence" else [given]
    templates = [part["single"] for part in parts if part and "single" in part]
    return any("SpecialToken" in template[0] for template in templates if template)


def with_bos_template(
    description: Mapping[str, Any], *, bos_token: str, id_: int
) -> dict[str, Any]:
    """The same description, under which the special token `bos_token` is put before each text."""
    special = {"SpecialToken": {"id": bos_token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {bos_token: {"id": bos_token, "ids": [id_], "tokens": [bos_token]}},
    }
    kept = without_template(description)["post_processor"]
    both = {"type": "Sequence", "processors": [kept, template]} if kept else template
    return {**description, "post_processor": both}


WORD_END = re.compile("</w>$")
"""What ends an entry that ends a word; a space stands there in a text."""


def is_gpt(description: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    normalizer, model = description.get("normalizer") or {}, description["model"]
    return (
        normalizer.get("type") == "BertNormalizer"
        and model.get("type") == "BPE"
        and model.get("end_of_word_suffix") == "</w>"
    )
