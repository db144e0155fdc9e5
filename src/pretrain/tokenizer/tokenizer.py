"""The tokenizer: text in, ids out, and back, for bpe, characters and bytes alike.

It owns a `tokenizers.Tokenizer` and adds what a corpus needs: linear time on long texts, the bytes
of each id, and a hash. It refuses characters that a `characters` vocabulary lacks, ids outside the
vocabulary, and vocabularies under which text would be lost without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.tokenizer.alphabet import byte_symbols, symbol_bytes
from pretrain.tokenizer.pieces import PIECE_CHARACTERS, pieces, words

if TYPE_CHECKING:
    import tokenizers

Ids = NDArray[np.int64]

END_OF_TEXT = "<|endoftext|>"
_OTHER_ENDS = ("<|end_of_text|>",)  # Llama 3
FILE_NAME = "tokenizer.json"

# About 50 MB; in text without spaces a "word" is long, hence the second bound.
_MAX_REMEMBERED_WORDS = 1 << 18
_MAX_REMEMBERED_CHARACTERS = 1 << 23
_MISSES_AT_ONCE = 1 << 15
_PIECES_AT_ONCE = 64


class Tokenizer:
    """Text <-> ids. Made by `train_tokenizer` or `load_tokenizer`."""

    kind: Literal["bpe", "characters", "bytes"]
    vocab_size: int
    """Number of ids, end-of-text included; ids are 0 .. vocab_size - 1."""
    end_of_text: int
    """Id of the end-of-text token; text never encodes to it."""
    sha256: str
    """Hash of the canonical tokenizer.json, which is what `save` writes."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        """Take over a library tokenizer. Raises ValueError where it could lose text or has no
        end-of-text token."""
        library.no_truncation()
        library.no_padding()
        # The text of a document is ordinary text, also where it spells a special token.
        library.encode_special_tokens = True
        self._library = library
        description = json.loads(library.to_str())
        self._canonical = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "replace"
        )
        self.sha256 = hashlib.sha256(self._canonical).hexdigest()

        entries = _entries(library)
        special = {
            token["id"] for token in description.get("added_tokens", ()) if token.get("special")
        }
        self.vocab_size = len(entries)
        self.end_of_text = _end_of_text(entries, special)
        self.kind = _kind(description, entries, special)
        self._token_bytes = _bytes_of_entries(self.kind, entries, description)

        # GPT-2's own pre-split: words can be encoded one by one, and each only once.
        self._splits_at_words = self.kind == "bpe" and _is_gpt2_split(description)
        self._remembered: dict[str, bytes] = {}
        self._n_remembered_characters = 0
        self._table = self._build_table(entries) if self.kind != "bpe" else np.empty(0, np.int64)

    def encode(self, text: str) -> Ids:
        """Ids of a text, shape (n,), int64, without an end-of-text token.

        Lone surrogates become U+FFFD. Raises ValueError for a character that a `characters`
        vocabulary lacks.
        """
        text = _without_surrogates(text)
        if self.kind == "bytes":
            return self._table[np.frombuffer(text.encode(), dtype=np.uint8)]
        if self.kind == "characters":
            return self._encode_characters(text)
        if self._splits_at_words:
            return self._encode_words(text)
        return self._encode_pieces(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text; the same as `encode` of each, and quicker for many short texts."""
        if not self._splits_at_words:
            return [self.encode(text) for text in texts]
        split = [self._split(_without_surrogates(text)) for text in texts]
        self._remember(word for parts in split for word in parts)
        return [self._look_up(parts) for parts in split]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; end-of-text is nothing, and bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return b"".join(self.token_bytes(int(id_)) for id_ in ids).decode("utf-8", "replace")

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of text that an id stands for; of end-of-text none."""
        if not 0 <= id_ < self.vocab_size:
            raise ValueError(f"token id {id_} does not exist; legal: 0 to {self.vocab_size - 1}")
        return self._token_bytes[id_]

    def byte_lengths(self) -> Ids:
        """Number of bytes of text of each id, shape (vocab_size,), int64; end-of-text counts 0."""
        return np.array([len(value) for value in self._token_bytes], dtype=np.int64)

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into `folder`, which is made if it is missing; returns the file's
        path."""
        os.makedirs(folder, exist_ok=True)
        path = Path(folder) / FILE_NAME
        with open(path, "wb") as file:
            file.write(self._canonical)
            file.flush()
            os.fsync(file.fileno())
        return path

    def _build_table(self, entries: list[str]) -> Ids:
        """Ids by byte value, or by code point with -1 where the vocabulary has no such
        character."""
        if self.kind == "bytes":
            of_entry = {entry: id_ for id_, entry in enumerate(entries)}
            return np.array([of_entry[symbol] for symbol in byte_symbols()], dtype=np.int64)
        points = {ord(entry): id_ for id_, entry in enumerate(entries) if len(entry) == 1}
        table = np.full(max(points) + 1, -1, dtype=np.int64)
        table[list(points)] = list(points.values())
        return table

    def _encode_characters(self, text: str) -> Ids:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids: Ids = self._table[np.minimum(points, len(self._table) - 1)]
        ids[points >= len(self._table)] = -1
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            character = text[int(unknown[0])]
            raise ValueError(
                f"the character {character!r} (U+{ord(character):04X}) is not in this vocabulary "
                "of "
                f"{self.vocab_size - 1} characters; the tokenizers bpe and bytes take any text"
            )
        return ids

    def _encode_pieces(self, text: str) -> Ids:
        found: list[Ids] = [np.empty(0, np.int64)]
        cut = pieces(text)
        while batch := list(islice(cut, _PIECES_AT_ONCE)):
            for each in self._library.encode_batch_fast(batch, add_special_tokens=False):
                found.append(np.asarray(each.ids, dtype=np.int64))
        return np.concatenate(found)

    def _encode_words(self, text: str) -> Ids:
        found: list[Ids] = [np.empty(0, np.int64)]
        for piece in pieces(text, limit=1 << 20):
            split = self._split(piece)
            self._remember(split)
            found.append(self._look_up(split))
        return np.concatenate(found)

    def _split(self, text: str) -> list[str]:
        split = words(text)
        if max(map(len, split), default=0) > PIECE_CHARACTERS:
            split = [piece for word in split for piece in pieces(word)]
        return split

    def _remember(self, split: Iterable[str]) -> None:
        """Make sure that the ids of all these words are remembered, the library encoding those that
        are not."""
        if (
            len(self._remembered) > _MAX_REMEMBERED_WORDS
            or self._n_remembered_characters > _MAX_REMEMBERED_CHARACTERS
        ):
            self._remembered.clear()
            self._n_remembered_characters = 0
        misses = iter(set(split).difference(self._remembered))
        while batch := list(islice(misses, _MISSES_AT_ONCE)):
            encodings = self._library.encode_batch_fast(batch, add_special_tokens=False)
            for word, each in zip(batch, encodings, strict=True):
                self._remembered[word] = np.asarray(each.ids, dtype=np.uint32).tobytes()
                self._n_remembered_characters += len(word)

    def _look_up(self, split: list[str]) -> Ids:
        found = b"".join(map(self._remembered.__getitem__, split))
        return np.frombuffer(found, dtype=np.uint32).astype(np.int64)


def _entries(library: tokenizers.Tokenizer) -> list[str]:
    """The vocabulary by id. ValueError if ids are missing or double."""
    vocabulary = library.get_vocab(with_added_tokens=True)
    by_id = {id_: entry for entry, id_ in vocabulary.items()}
    if len(by_id) < len(vocabulary) or sorted(by_id) != list(range(len(by_id))):
        missing = next((i for i in range(len(by_id)) if i not in by_id), None)
        what = "two entries share an id" if missing is None else f"id {missing} is missing"
        raise ValueError(f"tokenizer vocabulary of {len(vocabulary)} entries has holes: {what}")
    return [by_id[id_] for id_ in range(len(by_id))]


def _end_of_text(entries: list[str], special: set[int]) -> int:
    for name in (END_OF_TEXT, *_OTHER_ENDS):
        if name in entries and entries.index(name) in special:
            return entries.index(name)
    raise ValueError(f"tokenizer has no special token {END_OF_TEXT!r} to end a document with")


def _kind(
    description: dict[str, object], entries: list[str], special: set[int]
) -> Literal["bpe", "characters", "bytes"]:
    if description.get("normalizer") is not None:
        raise ValueError(
            "tokenizer has a normalizer, which changes the text before it is encoded; legal: none"
        )
    model = description["model"]
    assert isinstance(model, dict)
    plain = [entry for id_, entry in enumerate(entries) if id_ not in special]
    if model.get("type") == "WordLevel":
        if not plain or any(len(entry) != 1 for entry in plain):
            raise ValueError("tokenizer is a word list; legal: byte-level BPE or single characters")
        return "characters"
    if model.get("type") != "BPE" or '"ByteLevel"' not in json.dumps(description["pre_tokenizer"]):
        raise ValueError(
            f"tokenizer is of type {model.get('type')}; legal: byte-level BPE or single characters"
        )
    missing = set(byte_symbols()).difference(plain)
    if missing:
        value = min(symbol_bytes()[symbol] for symbol in missing)
        raise ValueError(
            f"tokenizer vocabulary lacks {len(missing)} of the 256 bytes (the first is "
            f"0x{value:02X}): text with "
            "them would be lost"
        )
    if _is_gpt2_split(description) and not model.get("merges") and len(plain) == 256:
        return "bytes"
    return "bpe"


def _is_gpt2_split(description: dict[str, object]) -> bool:
    split = description["pre_tokenizer"]
    model = description["model"]
    added = description.get("added_tokens", [])
    assert isinstance(split, dict)
    assert isinstance(model, dict)
    assert isinstance(added, list)
    return (
        split.get("type") == "ByteLevel"
        and split.get("add_prefix_space") is False
        and split.get("use_regex") is True
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(token.get("special") for token in added)
    )


def _bytes_of_entries(kind: str, entries: list[str], description: dict[str, object]) -> list[bytes]:
    added = description.get("added_tokens", [])
    assert isinstance(added, list)
    literal = {
        token["id"]: b"" if token.get("special") else token["content"].encode() for token in added
    }
    symbols = symbol_bytes()
    values: list[bytes] = []
    for id_, entry in enumerate(entries):
        if id_ in literal:
            values.append(literal[id_])
        elif kind == "characters":
            values.append(entry.encode())
        else:
            try:
                values.append(bytes(symbols[symbol] for symbol in entry))
            except KeyError as error:
                raise ValueError(
                    f"tokenizer entry {id_} is {entry!r}, which is not written in GPT-2's byte "
                    "alphabet"
                ) from error
    return values


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
