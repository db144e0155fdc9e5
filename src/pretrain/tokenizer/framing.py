"""What a tokenizer.json has other programs put around a text.

Here a text is framed by who reads it: `start_of_text` stands before documents, scored texts and,
unless the model is somebody else's and its own tokenizer puts nothing there, prompts and contexts.
So what a file adds is dropped when a tokenizer is made of it, and an exported one adds just that
token; both leave the ids of the text itself alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def without_frame(description: Mapping[str, Any]) -> dict[str, Any]:
    """The same description, under which nothing is put around a text."""
    given = description.get("post_processor")
    parts = given["processors"] if given and given["type"] == "Sequence" else [given]
    # This one adds no ids; it says where in the text they come from.
    kept = [part for part in parts if part and part["type"] == "ByteLevel"]
    return {**description, "post_processor": kept[0] if kept else None}


def puts_start(description: Mapping[str, Any]) -> bool:
    """Whether other programs put a special token before a text."""
    given = description.get("post_processor")
    parts = given["processors"] if given and given["type"] == "Sequence" else [given]
    templates = [part["single"] for part in parts if part and "single" in part]
    return any("SpecialToken" in template[0] for template in templates if template)


def with_start(description: Mapping[str, Any], *, start: str, id_: int) -> dict[str, Any]:
    """The same description, under which the special token `start` is put before each text."""
    special = {"SpecialToken": {"id": start, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {start: {"id": start, "ids": [id_], "tokens": [start]}},
    }
    kept = without_frame(description)["post_processor"]
    both = {"type": "Sequence", "processors": [kept, template]} if kept else template
    return {**description, "post_processor": both}
