"""The tokenizer: text in, ids out, and back, for all kinds of vocabularies.

It owns a tokenizer.json of the library `tokenizers`, an `Encoder` for its kind, its special tokens
and its hash. Characters that the vocabulary lacks, ids outside the vocabulary, and vocabularies
under which text would be lost are ValueErrors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer

from pretrain.fileio import replace_file, without_surrogates
from pretrain.tokenizer.byte_level import special_token
from pretrain.tokenizer.encode import PROBE, Ids, Kind, create_encoder, split_text, steps_of

FILE_NAME = "tokenizer.json"
RARE = 100
"""A token with fewer occurrences is under-trained: its embedding stays close to its initial value
(Land and Bartolo, "Fishing for Magikarp", 2024, find such tokens in most models)."""
SHOWN = 20
END_OF_TEXT = "<|endoftext|>"
START_OF_TEXT = {
    END_OF_TEXT: "",
    "<|end_of_text|>": "<|begin_of_text|>",
    "</s>": "<s>",
    "<eos>": "<bos>",
    "[EOS]": "[BOS]",
    "<EOT>": "",
    "<｜end▁of▁sentence｜>": "<｜begin▁of▁sentence｜>",
}
"""By the known end-of-text tokens, the first of which counts, the start-of-text token: of GPT-2,
Llama 3, Llama 1 and 2, Gemma, many small vocabularies (two rows), and DeepSeek."""


class Tokenizer:
    """Text <-> ids; created by `train_tokenizer` or `load_tokenizer`.

    Example, with the tokens <|endoftext|>, a, b, Ġ, ab and Ġab as ids 0 to 5 (Ġ is the space):
    encode("ab ab") -> [4, 5], decode([4, 5]) -> "ab ab", encode_prompt("ab") -> [0, 4].
    """

    vocab_size: int
    """Number of ids, including end-of-text; ids are 0 .. vocab_size - 1."""
    end_of_text: int
    """Id of the end-of-text token, to which no text is encoded."""
    start_of_text: int
    """Id before a document: a token of its own in Llama's vocabularies, else end-of-text, which
    then separates documents."""
    add_bos: bool
    """Whether start_of_text is put before a prompt or a context: always for models trained here,
    for imported models as in their own files."""
    stop_ids: list[int]
    """Ids at which generation ends: end_of_text, or those of an imported model's files."""
    carried: dict[str, Any]
    """What an export of an imported model has again, as keys of tokenizer_config.json: the chat
    template and the padding token. Nothing here uses them."""
    sha256: str
    """Hash of the canonical tokenizer.json, which `save` writes."""

    def __init__(
        self, library: LibraryTokenizer, *, end: str | None = None, start: str | None = None
    ) -> None:
        """Take over a library tokenizer; ValueError if text could be lost or there is no
        end-of-text token.

        `end` and `start` are the names of end-of-text and start-of-text in a vocabulary that has
        none of the known ones; `save` marks them.
        """
        library.no_truncation()
        library.no_padding()
        description = json.loads(library.to_str())
        self._special = {
            token["content"]: token["id"]
            for token in description["added_tokens"]
            if token["special"]
        }
        steps = steps_of(description.get("post_processor"))
        marked = {
            key: "".join(token["tokens"])
            for step in steps
            for key, token in step.get("special_tokens", {}).items()
        }
        known = [name for name in START_OF_TEXT if name in self._special]
        if known:
            end, start = known[0], START_OF_TEXT[known[0]]
        else:
            end, start = marked.get("end_of_text", end), marked.get("start_of_text", start)
        if end not in self._special:
            raise ValueError(
                f"the tokenizer must have a special token to end a document: "
                f"{', '.join(START_OF_TEXT)}, or the eos_token of tokenizer_config.json next to it"
            )
        start = start if start in self._special else end
        self._marks = {} if known else {"end_of_text": end, "start_of_text": start}
        self.end_of_text, self.start_of_text = self._special[end], self._special[start]
        # The ByteLevel post-processor adds no ids: it computes the offsets of tokens in the text.
        self._offsets = next((step for step in steps if step["type"] == "ByteLevel"), None)
        bare = {**description, "post_processor": self._post_processor()}
        if not steps_of(description["normalizer"]):
            bare["normalizer"] = None
        if bare != description:
            description = bare
            library = LibraryTokenizer.from_str(json.dumps(description))
        # The text of a document is ordinary text, even where it contains a special token's name.
        library.encode_special_tokens = True
        self._canonical = _compact_json(description)
        self.sha256 = hashlib.sha256(self._canonical).hexdigest()

        self._tokens = token_list(library.get_vocab(with_added_tokens=True))
        self.vocab_size = len(self._tokens)
        self.add_bos = True
        self.stop_ids = [self.end_of_text]
        self.carried = {}

        self.encoder = create_encoder(self._tokens, description, library)
        self.kind: Kind = self.encoder.kind
        self.space_prefix = self.encoder.space_prefix
        if self.kind == "bpe" and not all(
            self.decode(self.encode(text)) == text for text in (PROBE, " " + PROBE)
        ):
            raise ValueError(
                "the tokenizer does not decode ids to the text that was encoded (a text of all "
                "kinds of characters); its pre-tokenizer must neither remove nor add characters"
            )

    def encode(self, text: str, *, special: bool = False) -> Ids:
        """Encode a text without an end-of-text token: ids of shape (n,), int64.

        With `special` the names of special tokens in the text become these tokens; otherwise they
        are ordinary text. Lone surrogates become U+FFFD. ValueError for a character that the
        vocabulary lacks: of the kind `characters`, or a control character.
        """
        if not special or not self._special:
            return np.concatenate([np.empty(0, np.int64), *self.encode_chunks(text)])
        names = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        ids = [np.empty(0, np.int64)]
        for part in re.split(f"({names})", without_surrogates(text)):
            if part in self._special:
                ids.append(np.array([self._special[part]], np.int64))
            elif part:
                ids.append(self.encode(part))
        return np.concatenate(ids)

    def encode_chunks(self, text: str) -> Iterator[Ids]:
        """Yield the ids of `encode` in chunks, so that a text of any length needs little memory."""
        chunks = split_text(without_surrogates(text), limit=self.encoder.chunk_characters)
        for number, chunk in enumerate(chunks):
            character = self.first_unencodable(chunk)
            if character is not None:
                raise ValueError(
                    f"the character {character!r} (U+{ord(character):04X}) is not in this "
                    f"vocabulary of {self.vocab_size - 1} tokens; the tokenizers bpe and bytes "
                    "encode any text"
                )
            yield self.encoder.encode(chunk, is_first=number == 0)

    def first_unencodable(self, text: str) -> str | None:
        """The first character of a text that the vocabulary lacks; None if it has all of them."""
        match = self.encoder.unencodable.search(text) if self.encoder.unencodable else None
        return match[0] if match else None

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Encode a text that a model continues: at least one id.

        start_of_text comes first if `add_bos`, unless the text already begins with it, and if the
        text is empty.
        """
        ids: list[int] = self.encode(text, special=special).tolist()
        if ids and (ids[0] == self.start_of_text or not self.add_bos):
            return ids
        return [self.start_of_text, *ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text: special tokens are nothing, bytes that are not UTF-8 become U+FFFD.

        ValueError for an id outside the vocabulary.
        """
        return self.encoder.decode(b"".join(self.token_bytes(int(id_)) for id_ in ids))

    def decode_after(self, before: Sequence[int], ids: Iterable[int]) -> str:
        """The text that ids add to the text of `before`; a space between the two is kept."""
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    def token_text(self, id_: int) -> str:
        """The text of an id by itself, with all of its spaces."""
        return self.token_bytes(id_).decode("utf-8", "replace")

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of text that an id stands for; none for special tokens."""
        if not 0 <= id_ < self.vocab_size:
            raise ValueError(f"token id {id_} must be between 0 and {self.vocab_size - 1}")
        return self.encoder.token_bytes[id_]

    @cached_property
    def byte_lengths(self) -> Ids:
        """Bytes of text of each id, shape (vocab_size,), int64; 0 for special tokens."""
        return np.array([len(value) for value in self.encoder.token_bytes], dtype=np.int64)

    def id_to_token(self, id_: int) -> str:
        """The spelling of an id in the vocabulary."""
        return self._tokens[id_]

    def token_to_id(self, token: str) -> int | None:
        """The id of a spelling; None if the vocabulary lacks it."""
        return self._tokens.index(token) if token in self._tokens else None

    @property
    def description(self) -> dict[str, Any]:
        """The content of tokenizer.json, parsed at each call: it is large as Python objects."""
        content: dict[str, Any] = json.loads(self._canonical)
        return content

    def padded(self, vocab_size: int) -> Tokenizer:
        """This tokenizer with unused special tokens at the end, for models that have more embedding
        rows than their vocabulary has tokens."""
        library = LibraryTokenizer.from_str(self._canonical.decode())
        names = [f"<|unused_{id_}|>" for id_ in range(self.vocab_size, vocab_size)]
        library.add_special_tokens([special_token(name) for name in names])
        tokenizer = Tokenizer(library)
        tokenizer.add_bos = self.add_bos
        tokenizer.stop_ids, tokenizer.carried = self.stop_ids, self.carried
        return tokenizer

    def save(self, folder: str | Path, *, bos_template: bool = False) -> Path:
        """Write `tokenizer.json` into `folder`, which is created if necessary; return its path.

        With `bos_template` and `add_bos`, other programs put start-of-text before each text. Loaded
        here, the file is the same tokenizer.
        """
        os.makedirs(folder, exist_ok=True)
        path = Path(folder) / FILE_NAME
        content = self._canonical
        if bos_template and self.add_bos:
            processor = self._post_processor(bos=self._tokens[self.start_of_text])
            content = _compact_json({**self.description, "post_processor": processor})
        replace_file(path, content)
        return path

    def _post_processor(self, *, bos: str | None = None) -> dict[str, Any] | None:
        """The post-processor of tokenizer.json: the offsets, a template that puts `bos` before a
        text, and the names of end-of-text and start-of-text, which no template uses."""
        names = ({bos: bos} if bos else {}) | self._marks
        if not names:
            return self._offsets
        special = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
        first = [*special, {"Sequence": {"id": "A", "type_id": 0}}]
        template = {
            "type": "TemplateProcessing",
            "single": first,
            "pair": [*first, *special, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                key: {"id": key, "ids": [self._special[name]], "tokens": [name]}
                for key, name in names.items()
            },
        }
        if self._offsets is None:
            return template
        return {"type": "Sequence", "processors": [self._offsets, template]}


def _compact_json(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def token_list(id_of: Mapping[str, int]) -> list[str]:
    """The tokens of a vocabulary by id; ValueError if ids are missing or used twice."""
    token_of = {id_: token for token, id_ in id_of.items()}
    if len(token_of) < len(id_of):
        raise ValueError(
            f"{len(id_of)} tokens have {len(token_of)} ids; each must have an id of its own"
        )
    missing = set(range(len(token_of))) - token_of.keys()
    if missing:
        raise ValueError(
            f"id {min(missing)} is missing; the ids of {len(id_of)} tokens must be 0 to "
            f"{len(id_of) - 1}"
        )
    return [token_of[id_] for id_ in range(len(token_of))]


# The BOS template: programs other than this one put the tokens of a tokenizer.json's
# `post_processor` around each text. Here the reader of a text decides: start-of-text comes before
# documents, evaluated texts and, unless an imported model does without, prompts. So the template of
# a file is removed when a tokenizer is created from it, and an exported file gets one with just
# that token. Neither changes the ids of the text itself.


def template_adds_bos(description: Mapping[str, Any]) -> bool:
    """Whether other programs put a special token before a text."""
    steps = steps_of(description.get("post_processor"))  # "cls": BERT's and RoBERTa's
    return any("cls" in step or "SpecialToken" in (step.get("single") or [{}])[0] for step in steps)


# Statistics


def inspect(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Report statistics of a vocabulary, and how texts, given as (source, text), use it.

    Plain values for JSON: bytes per token by source, tokens that the texts never or rarely use (a
    model cannot learn those), the longest tokens, and strange ones.
    """
    values = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]

    def rows(ids: Iterable[int]) -> list[dict[str, Any]]:
        return [
            {"id": id_, "bytes": len(values[id_]), "text": values[id_].decode("utf-8", "replace")}
            for id_ in list(ids)[:SHOWN]
        ]

    longest = sorted(range(tokenizer.vocab_size), key=lambda id_: -len(values[id_]))
    strange = [id_ for id_ in longest if len(values[id_]) > 1 and _is_strange(values[id_])]
    report: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "sha256": tokenizer.sha256,
        "longest": rows(longest),
        "n_strange": len(strange),
        "strangest": rows(strange),
    }

    counts = np.zeros(tokenizer.vocab_size, np.int64)
    sources: dict[str, dict[str, float]] = {}
    for source, text in texts:
        ids = tokenizer.encode(text)
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        row = sources.setdefault(source, {"bytes": 0, "tokens": 0, "bytes_per_token": 0.0})
        row["bytes"] += len(text.encode())
        row["tokens"] += len(ids)
        row["bytes_per_token"] = row["bytes"] / max(1, row["tokens"])
    if not sources:
        return report

    has_text = tokenizer.byte_lengths > 0
    unused = np.flatnonzero(has_text & (counts == 0))
    rare = np.flatnonzero(has_text & (counts > 0) & (counts < RARE))
    return report | {
        "sources": sources,
        "n_unused": len(unused),
        "unused": rows(sorted(unused.tolist(), key=lambda id_: -len(values[id_]))),
        "n_rare": len(rare),
        "rare": rows(rare[np.argsort(counts[rare])].tolist()),
    }


def _is_strange(value: bytes) -> bool:
    """Whether bytes are not valid UTF-8 by themselves, or are a run of one character."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return True
    return len(text) > 3 and len(set(text.strip())) <= 1
