"""The tokenizer: text in, ids out, and back, for every kind alike.

It owns a `tokenizers.Tokenizer` and adds what a corpus needs: linear time on long texts, the bytes
of each id, and a hash. It refuses characters that a `characters` vocabulary lacks, ids outside the
vocabulary, and vocabularies under which text would be lost without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pretrain.tokenizer.byte_level import Split, byte_symbols, split_of, symbol_bytes
from pretrain.tokenizer.encode import PIECE_CHARACTERS, pieces
from pretrain.tokenizer.sentencepiece import SPACE, space_prefix
from pretrain.tokenizer.tokenizer_json import (
    RARE,
    STARTS,
    WORD_END,
    Kind,
    end_of_text_of,
    kind_of,
    missing_bytes,
    with_bos_template,
    without_template,
)

if TYPE_CHECKING:
    import fastokens
    import tokenizers

Ids = NDArray[np.int64]

FILE_NAME = "tokenizer.json"
_BYTE_ENTRY = re.compile("<0x([0-9A-F]{2})>")

_PART_CHARACTERS = 1 << 20
# Something of everything that pre-splits and merges treat differently, and all signs of ASCII.
_PROBE = (
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~089ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz "
    "The whale's 1234567 don't\tEND\n\n I'LL he'd a/b// -+=<|endoftext|> for(i=0;i<10;i++){}\r\n  "
    "\u200b\u00a0a\u0301\u2028\x85 \U0001f3f3\ufe0f\u200d\U0001f308 \U00010400 "
    "été ÉTÉ Straße 中文字 ﷽ नमस्ते กับ שלום أهل Ǆǅǆ ²½Ⅷ aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa   "
)


class Tokenizer:
    """Text <-> ids. Made by `train_tokenizer` or `load_tokenizer`."""

    kind: Kind
    vocab_size: int
    """Number of ids, end-of-text included; ids are 0 .. vocab_size - 1."""
    end_of_text: int
    """Id of the end-of-text token; text never encodes to it."""
    start_of_text: int
    """Id that a document begins with: a token of its own in Llama's vocabularies, else that of
    end-of-text, which stands between documents."""
    add_bos: bool
    """Whether start_of_text stands before a prompt or a context: always for models trained here;
    where somebody else's is opened, what its own files do."""
    stop_ids: list[int]
    """Ids that end what a model writes: end_of_text, or what somebody else's own files name."""
    sha256: str
    """Hash of the canonical tokenizer.json, which is what `save` writes."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        """Take over a library tokenizer. Raises ValueError where it could lose text or has no
        end-of-text token."""
        library.no_truncation()
        library.no_padding()
        # The text of a document is ordinary text, also where it spells a special token.
        library.encode_special_tokens = True
        description = json.loads(library.to_str())
        if (plain := without_template(description)) != description:
            library, description = _library_of(plain), plain
        self._canonical = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "replace"
        )
        self.sha256 = hashlib.sha256(self._canonical).hexdigest()

        entries = _entries(library)
        special = {
            token["id"] for token in description.get("added_tokens", ()) if token.get("special")
        }
        self.vocab_size = len(entries)
        self._special = {entries[id_]: id_ for id_ in special}
        self.end_of_text = end_of_text_of(entries, special)
        start = STARTS.get(entries[self.end_of_text], "")
        self.start_of_text = self._special.get(start, self.end_of_text)
        self.add_bos, self.stop_ids = True, [self.end_of_text]
        self.kind = kind_of(description, entries, special)
        self._token_bytes = _bytes_of_entries(self.kind, entries, description)

        # SentencePiece's spaces are made here, so that a long text can be cut.
        self._prefix = space_prefix(description)
        if self._prefix is not None:
            library = _library_of(description | {"normalizer": None})
        self._library = library
        self._fast = _fast_twin(library) if self.kind == "bpe" else None
        is_byte_level = self.kind == "bpe" and self._prefix is None
        missing = "".join(RARE[b] for b in missing_bytes(entries, special) if is_byte_level)
        if self.kind == "characters":
            missing = "^" + re.escape("".join(e for e in entries if len(e) == 1))
        self._missing = re.compile(f"[{missing}]") if missing else None
        is_table = self.kind in ("bytes", "characters")
        self._table = self._build_table(entries) if is_table else np.empty(0, np.int64)
        probes = (_PROBE, " " + _PROBE) if self.kind == "bpe" else ()
        if any(self.decode(self.encode(probe)) != probe for probe in probes):
            raise ValueError(
                "tokenizer gives back another text than it was given, of all kinds of characters; "
                "legal: a pre-tokenizer that drops and adds nothing"
            )

    def encode(self, text: str, *, special: bool = False) -> Ids:
        """Ids of a text, shape (n,), int64, without an end-of-text token.

        With `special` the names of special tokens in the text stand for them; else they are text
        like any other. Lone surrogates become U+FFFD. Raises ValueError for a character that the
        vocabulary lacks: of the kind `characters`, or a control character.
        """
        text = without_surrogates(text)
        if special and self._special:
            names = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
            parts = re.split(f"({names})", text)
            found = [
                self.encode(part)
                if part not in self._special
                else np.array([self._special[part]], np.int64)
                for part in parts
                if part
            ]
            return np.concatenate([np.empty(0, np.int64), *found])
        if self.kind == "bytes":
            return self._table[np.frombuffer(text.encode(), dtype=np.uint8)]
        if self.kind == "characters":
            self._refuse_missing(text)
            ids: Ids = self._table[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]
            return ids
        return np.concatenate([np.empty(0, np.int64), *self.encode_chunks(text)])

    def first_unencodable(self, text: str) -> str | None:
        """The first character of a text that the vocabulary lacks; None if it has them all."""
        found = self._missing.search(text) if self._missing is not None else None
        return found[0] if found else None

    def _refuse_missing(self, text: str) -> None:
        if (lacking := self.first_unencodable(text)) is not None:
            raise ValueError(
                f"the character {lacking!r} (U+{ord(lacking):04X}) is not in this vocabulary of "
                f"{self.vocab_size - 1} entries; the tokenizers bpe and bytes take any text"
            )

    def encode_chunks(self, text: str) -> Iterator[Ids]:
        """The ids of `encode` in parts, so that a text of any length takes little memory."""
        if self.kind in ("bytes", "characters"):
            for part in pieces(text, limit=_PART_CHARACTERS):
                yield self.encode(part)
            return
        fast, prefix, has_spaces = self._fast, self._prefix or "", self._prefix is not None
        limit = PIECE_CHARACTERS if fast is None or has_spaces else _PART_CHARACTERS
        for piece in pieces(without_surrogates(text), limit=limit):
            self._refuse_missing(piece)
            part = prefix + piece.replace(" ", SPACE) if has_spaces else piece
            prefix = ""
            # The twin takes "<s>" and "<0x41>" in the text for SentencePiece's entries of the name.
            if fast is None or (has_spaces and "<" in part):
                yield _plainly(self._library, part)
            else:
                yield _fastly(fast, part)

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text that is to be continued, at least one: behind start_of_text where that is
        how texts begin (`add_bos`) and not there yet, and where there is no text."""
        ids: list[int] = self.encode(text, special=special).tolist()
        start = [self.start_of_text]
        return ids if ids[:1] == start or (ids and not self.add_bos) else [*start, *ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; end-of-text is nothing, and bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        data = b"".join(self.token_bytes(int(id_)) for id_ in ids)
        if self.kind == "gpt":
            return data.decode().removesuffix(" ")
        # The space that SentencePiece puts before a text is none of the text.
        return data.removeprefix(b" " if self._prefix else b"").decode("utf-8", "replace")

    def decode_after(self, before: Sequence[int], ids: Iterable[int]) -> str:
        """What ids add to the text of those before them: a space between the two stays."""
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    def token_text(self, id_: int) -> str:
        """The text of an id by itself, with all of its spaces."""
        return self.token_bytes(id_).decode("utf-8", "replace")

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of text that an id stands for; of end-of-text none."""
        if not 0 <= id_ < self.vocab_size:
            raise ValueError(f"token id {id_} does not exist; legal: 0 to {self.vocab_size - 1}")
        return self._token_bytes[id_]

    def byte_lengths(self) -> Ids:
        """Number of bytes of text of each id, shape (vocab_size,), int64; end-of-text counts 0."""
        return np.array([len(value) for value in self._token_bytes], dtype=np.int64)

    @property
    def description(self) -> dict[str, Any]:
        """What tokenizer.json says."""
        content: dict[str, Any] = json.loads(self._canonical)
        return content

    @property
    def split(self) -> Split | None:
        """How text is cut into words before merging; None where that has no name here."""
        return split_of(self.description)

    @property
    def space_prefix(self) -> str | None:
        """What SentencePiece puts before a text, a space or nothing; None for other kinds."""
        return self._prefix

    def id_to_token(self, id_: int) -> str:
        """How the vocabulary spells an id."""
        found: str | None = self._library.id_to_token(id_)
        assert found is not None, f"{id_} is no id"
        return found

    def padded(self, vocab_size: int) -> Tokenizer:
        """This tokenizer with special entries at the end, which no text encodes to, so that it has
        `vocab_size`: some models have more rows than their vocabulary has entries."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Library

        library = Library.from_str(self._canonical.decode())
        names = [f"<|unused_{id_}|>" for id_ in range(self.vocab_size, vocab_size)]
        library.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
        larger = Tokenizer(library)
        larger.add_bos, larger.stop_ids = self.add_bos, self.stop_ids
        return larger

    def save(self, folder: str | Path, *, bos_template: bool = False) -> Path:
        """Write `tokenizer.json` into `folder`, which is made if it is missing; returns the file's
        path. `bos_template`: other programs then put start-of-text before a text where our prompts
        have it; read here again, it is the same tokenizer."""
        os.makedirs(folder, exist_ok=True)
        path = Path(folder) / FILE_NAME
        content = self._canonical
        if bos_template and self.add_bos:
            id_ = self.start_of_text
            framed = with_bos_template(self.description, bos_token=self.id_to_token(id_), id_=id_)
            content = json.dumps(framed, ensure_ascii=False, separators=(",", ":")).encode()
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return path

    def _build_table(self, entries: list[str]) -> Ids:
        """Ids by byte value, or by code point."""
        if self.kind == "bytes":
            of_entry = {entry: id_ for id_, entry in enumerate(entries)}
            return np.array([of_entry[symbol] for symbol in byte_symbols()], dtype=np.int64)
        points = {ord(entry): id_ for id_, entry in enumerate(entries) if len(entry) == 1}
        table = np.zeros(max(points) + 1, dtype=np.int64)
        table[list(points)] = list(points.values())
        return table


def _plainly(library: tokenizers.Tokenizer, text: str) -> Ids:
    return np.asarray(library.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _fastly(fast: fastokens.Tokenizer, text: str) -> Ids:
    """What `_plainly` gives, many times as fast."""
    # Flat, so that no Python object is made for a token; special tokens in the text are text.
    ids, _ = fast.encode_batch_flat([text], split_special_tokens=True)
    return np.frombuffer(ids, dtype="<u4").astype(np.int64)


def _library_of(description: dict[str, object]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Library

    library = Library.from_str(json.dumps(description))
    library.encode_special_tokens = True
    return library


def _fast_twin(library: tokenizers.Tokenizer) -> fastokens.Tokenizer | None:
    """The same tokenizer in the library fastokens; None where that cannot read it, or gives other
    ids for a text of all kinds of characters."""
    import fastokens

    try:
        fast = fastokens.Tokenizer.from_json_str(library.to_str())
        same = np.array_equal(_fastly(fast, _PROBE), _plainly(library, _PROBE))
    except BaseException as error:
        # Libraries in Rust panic with what is no Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        return None
    return fast if same else None


def _entries(library: tokenizers.Tokenizer) -> list[str]:
    """The vocabulary by id. ValueError if ids are missing or double."""
    vocabulary = library.get_vocab(with_added_tokens=True)
    by_id = {id_: entry for entry, id_ in vocabulary.items()}
    if len(by_id) < len(vocabulary) or sorted(by_id) != list(range(len(by_id))):
        missing = next((i for i in range(len(by_id)) if i not in by_id), None)
        what = "two entries share an id" if missing is None else f"id {missing} is missing"
        raise ValueError(f"tokenizer vocabulary of {len(vocabulary)} entries has holes: {what}")
    return [by_id[id_] for id_ in range(len(by_id))]


def _bytes_of_entries(kind: str, entries: list[str], description: dict[str, Any]) -> list[bytes]:
    literal = {
        token["id"]: b"" if token.get("special") else token["content"].encode()
        for token in description.get("added_tokens", ())
    }
    symbols, has_spaces = symbol_bytes(), space_prefix(description) is not None
    values: list[bytes] = []
    for id_, entry in enumerate(entries):
        if id_ in literal:
            values.append(literal[id_])
        elif kind == "characters":
            values.append(entry.encode())
        elif kind == "gpt":
            values.append(WORD_END.sub(" ", entry).encode())
        elif has_spaces:
            is_byte = _BYTE_ENTRY.fullmatch(entry)
            values.append(
                bytes([int(is_byte[1], 16)]) if is_byte else entry.replace(SPACE, " ").encode()
            )
        else:
            try:
                values.append(bytes(symbols[symbol] for symbol in entry))
            except KeyError as error:
                raise ValueError(
                    f"tokenizer entry {id_} is {entry!r:.60}, which is not written in GPT-2's byte "
                    "alphabet"
                ) from error
    return values


def without_surrogates(text: str) -> str:
    """A text with U+FFFD in place of each lone surrogate."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
