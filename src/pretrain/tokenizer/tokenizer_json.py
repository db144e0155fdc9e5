"""The contents of a tokenizer.json: its tokens, its special tokens, and its BOS template.

Programs other than this one put the tokens of the template (`post_processor`) around each text.
Here the reader of a text decides: start-of-text comes before documents, evaluated texts and, unless
an imported model does without, prompts. So the template of a file is removed when a tokenizer is
created from it, and an exported file gets one with just that token. Neither changes the ids of the
text itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

END_OF_TEXT = "<|endoftext|>"
START_OF_TEXT = {"<|end_of_text|>": "<|begin_of_text|>", "</s>": "<s>"}
"""The start-of-text token by end-of-text token: of Llama 3, and of Llama 1 and 2."""


def token_list(library: LibraryTokenizer) -> list[str]:
    """The tokens of a vocabulary by id; ValueError if ids are missing or used twice."""
    vocabulary = library.get_vocab(with_added_tokens=True)
    token_of = {id_: token for token, id_ in vocabulary.items()}
    if len(token_of) < len(vocabulary):
        raise ValueError(
            f"{len(vocabulary)} tokens have {len(token_of)} ids; each must have an id of its own"
        )
    missing = set(range(len(token_of))) - token_of.keys()
    if missing:
        raise ValueError(
            f"id {min(missing)} is missing; the ids of {len(vocabulary)} tokens must be 0 to "
            f"{len(vocabulary) - 1}"
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
    raise ValueError(f"the tokenizer must have the special token {END_OF_TEXT!r} to end a document")


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
