"""Text <-> ids for each kind of vocabulary: bytes, characters, byte-level BPE, GPT (2018) and
SentencePiece.

An `Encoder` encodes a chunk of text, and knows the bytes of each token. `split_text` cuts long
texts where no token can cross, so that encoding takes linear time and little memory, and the ids of
the chunks together are those of the full text.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import fastokens
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as LibraryTokenizer

from pretrain.tokenizer.byte_level import byte_symbols, split_of, symbol_bytes

Kind = Literal["bpe", "gpt", "characters", "bytes"]
Ids = NDArray[np.int64]
Description = Mapping[str, Any]

SPACE = "\u2581"
"""The character for a space in SentencePiece's vocabularies."""
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

CHUNK_CHARACTERS = 1 << 14
"""Chunk of the libraries whose time is not linear in the length of a run without spaces."""
LARGE_CHUNK_CHARACTERS = 1 << 20

# Python's \s includes U+001C to U+001F, but Unicode's White_Space, which the library uses, does
# not. A space after another character is a safe place in every pre-tokenizer in use, unlike a
# newline, which GPT-4's joins with the characters to the left.
_SAFE_PLACE = re.compile(r"[\S\x1c-\x1f](?= )")
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")

# All characters of ASCII, and an example of everything that pre-tokenizers and merges treat
# differently.
PROBE = (
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~089ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz "
    "The whale's 1234567 don't\tEND\n\n I'LL he'd a/b// -+=<|endoftext|> for(i=0;i<10;i++){}\r\n  "
    "\u200b\u00a0a\u0301\u2028\x85 \U0001f3f3\ufe0f\u200d\U0001f308 \U00010400 "
    "été ÉTÉ Straße 中文字 ﷽ नमस्ते กับ שלום أهل Ǆǅǆ ²½Ⅷ aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa   "
)


def split_text(text: str, *, limit: int = CHUNK_CHARACTERS) -> Iterator[str]:
    """Split a text into chunks of at most `limit` characters.

    A pre-tokenizer never puts a space after another character into one token with it, and never
    looks back. So the ids to the left and right of such a place are independent: "a cat sat" is
    "a", " cat", " sat". Where `limit` characters have no such place the text is cut at the limit,
    which changes at most the tokens at the cut.
    """
    start = 0
    while len(text) - start > limit:
        stop = start + limit
        space = stop
        while (space := text.rfind(" ", start + 1, space + 1)) > start:
            if _SAFE_PLACE.match(text, space - 1):
                stop = space
                break
            space -= 1
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


class Encoder(ABC):
    """Text <-> ids for one kind of vocabulary."""

    kind: Kind = "bpe"
    space_prefix: str | None = None
    """What SentencePiece puts before a text, SPACE or nothing; None for other vocabularies."""
    token_bytes: list[bytes]
    """The UTF-8 text of each id; empty for special tokens."""
    chunk_characters = LARGE_CHUNK_CHARACTERS
    """Characters that are encoded at once."""
    unencodable: re.Pattern[str] | None = None
    """Matches the characters that the vocabulary lacks."""

    def __init__(
        self, tokens: list[str], description: Description, library: LibraryTokenizer
    ) -> None:
        """`tokens` is the vocabulary by id, `description` the content of tokenizer.json."""
        self.library = library
        added = {
            token["id"]: b"" if token.get("special") else token["content"].encode()
            for token in description["added_tokens"]
        }
        self.token_bytes = [
            added[id_] if id_ in added else self._bytes_of(token)
            for id_, token in enumerate(tokens)
        ]
        self._set_up(tokens, description)

    def _set_up(self, tokens: list[str], description: Description) -> None:  # noqa: B027
        """Compute what encoding needs, after `library` and `token_bytes`."""

    @abstractmethod
    def encode(self, text: str, *, is_first: bool) -> Ids:
        """Encode one chunk of a text, without special tokens; `is_first` for its first chunk."""

    def decode(self, data: bytes) -> str:
        """Decode the joined `token_bytes` of a text."""
        return data.decode("utf-8", "replace")

    def _bytes_of(self, token: str) -> bytes:
        """The bytes of an ordinary token; by default it is written in GPT-2's byte alphabet."""
        try:
            return bytes(symbol_bytes()[symbol] for symbol in token)
        except KeyError as error:
            raise ValueError(
                f"the token {token!r:.60} must have only characters of GPT-2's byte alphabet"
            ) from error


class CharacterEncoder(Encoder):
    """Each token is one character."""

    kind = "characters"

    def _set_up(self, tokens: list[str], description: Description) -> None:
        id_of = {ord(token): id_ for id_, token in enumerate(tokens) if len(token) == 1}
        self._ids = np.zeros(max(id_of) + 1, dtype=np.int64)
        self._ids[list(id_of)] = list(id_of.values())
        characters = "".join(map(chr, id_of))
        self.unencodable = re.compile(f"[^{re.escape(characters)}]")

    def encode(self, text: str, *, is_first: bool) -> Ids:
        ids: Ids = self._ids[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]
        return ids

    def _bytes_of(self, token: str) -> bytes:
        return token.encode()


class ByteEncoder(Encoder):
    """Each token is one byte."""

    kind = "bytes"

    def _set_up(self, tokens: list[str], description: Description) -> None:
        id_of = {token: id_ for id_, token in enumerate(tokens)}
        self._ids = np.array([id_of[symbol] for symbol in byte_symbols()], dtype=np.int64)

    def encode(self, text: str, *, is_first: bool) -> Ids:
        ids: Ids = self._ids[np.frombuffer(text.encode(), dtype=np.uint8)]
        return ids


class LibraryEncoder(Encoder):
    """Byte-pair encoding by a library: fastokens if it gives the same ids, else `tokenizers`."""

    chunk_characters = CHUNK_CHARACTERS
    fast: fastokens.Tokenizer | None = None

    def encode(self, text: str, *, is_first: bool) -> Ids:
        if self.fast is None:
            return _encode_with_tokenizers(self.library, text)
        return _encode_with_fastokens(self.fast, text)


class BpeEncoder(LibraryEncoder):
    """Byte-level BPE."""

    def _set_up(self, tokens: list[str], description: Description) -> None:
        self.fast = load_fastokens(self.library)
        if self.fast is not None:
            self.chunk_characters = LARGE_CHUNK_CHARACTERS
        known = set(self.token_bytes)
        missing = [text for byte, text in OPTIONAL_BYTES.items() if bytes([byte]) not in known]
        if missing:
            self.unencodable = re.compile(f"[{''.join(missing)}]")


class Gpt2018Encoder(LibraryEncoder):
    """The BPE of GPT (2018), see `train.train_gpt`: a space follows each word."""

    kind = "gpt"

    def decode(self, data: bytes) -> str:
        return data.decode().removesuffix(" ")

    def _bytes_of(self, token: str) -> bytes:
        if token.endswith(END_OF_WORD):
            token = token.removesuffix(END_OF_WORD) + " "
        return token.encode()


class SentencePieceEncoder(LibraryEncoder):
    """SentencePiece's BPE with byte fallback.

    Spaces are replaced here and not by the library's normalizer, so that texts can be split.
    """

    def _set_up(self, tokens: list[str], description: Description) -> None:
        library = json.dumps({**description, "normalizer": None})
        self.library = LibraryTokenizer.from_str(library)
        self.library.encode_special_tokens = True
        self.fast = load_fastokens(self.library)
        self.space_prefix = space_prefix(description)

    def encode(self, text: str, *, is_first: bool) -> Ids:
        text = text.replace(" ", SPACE)
        if is_first:
            text = (self.space_prefix or "") + text
        # fastokens would encode "<s>" and "<0x41>" in a text as the tokens of that name.
        if "<" in text:
            return _encode_with_tokenizers(self.library, text)
        return super().encode(text, is_first=is_first)

    def decode(self, data: bytes) -> str:
        if self.space_prefix:
            data = data.removeprefix(b" ")
        return super().decode(data)

    def _bytes_of(self, token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def steps_of(component: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json, without the Sequences around them and without
    normalizers that change no text."""
    if not component:
        return []
    if component["type"] == "Sequence":
        parts = next(value for value in component.values() if isinstance(value, list))
        return [step for part in parts for step in steps_of(part)]
    if component["type"] == "Replace":
        is_idle = component["pattern"] == {"String": component["content"]}
    else:
        settings = [value for name, value in component.items() if name != "type"]
        is_idle = component["type"] in ("BertNormalizer", "Prepend", "Strip") and not any(settings)
    return [] if is_idle else [dict(component)]


def space_prefix(description: Description) -> str | None:
    """What a tokenizer.json written by `load.bpe_from_pieces` puts before a text: SPACE or nothing.

    None for a tokenizer.json of another kind.
    """
    steps, model = steps_of(description.get("normalizer")), description["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = steps_of(description.get("pre_tokenizer"))
    if before or steps not in ([prepend, replace], [replace]):
        return None
    return SPACE if prepend in steps else ""


def create_encoder(
    tokens: list[str], description: Description, library: LibraryTokenizer
) -> Encoder:
    """Create the encoder of a tokenizer.json; ValueError for one under which text would be lost."""
    model, added = description["model"], description["added_tokens"]
    normalizers = [step["type"] for step in steps_of(description.get("normalizer"))]
    is_bpe = model.get("type") == "BPE"
    word_end = model.get("end_of_word_suffix")
    is_gpt = is_bpe and normalizers == ["BertNormalizer"] and word_end == END_OF_WORD
    if "" in tokens:
        raise ValueError(
            "the tokenizer has an empty token, which merges without end; no token may be empty"
        )
    if model.get("dropout"):
        raise ValueError(
            f"the tokenizer has dropout {model['dropout']}; it must have none, or a text gets "
            "other ids each time"
        )
    if model.get("continuing_subword_prefix") or (word_end and not is_gpt):
        raise ValueError(
            "the tokenizer marks the inside or the end of words; it must be byte-level BPE"
        )
    if is_gpt:
        return Gpt2018Encoder(tokens, description, library)

    prefix = space_prefix(description)
    if normalizers and prefix is None:
        raise ValueError(
            f"the tokenizer has a normalizer, {normalizers[0]}, which changes text before it is "
            "encoded; it must have none"
        )
    for token in added:
        if not token.get("special") and any(map(token.get, ("lstrip", "rstrip", "single_word"))):
            raise ValueError(
                f"the token {token['content']!r:.60} removes spaces around it; lstrip, rstrip and "
                "single_word must be false"
            )
    special = {token["id"] for token in added if token.get("special")}
    ordinary = [token for id_, token in enumerate(tokens) if id_ not in special]
    if model.get("type") == "WordLevel":
        if not ordinary or any(len(token) != 1 for token in ordinary):
            raise ValueError(
                "the tokenizer is a list of words; it must be byte-level BPE or single characters"
            )
        return CharacterEncoder(tokens, description, library)
    if prefix is None and not (
        is_bpe and '"ByteLevel"' in json.dumps(description["pre_tokenizer"])
    ):
        before = ", ".join(step["type"] for step in steps_of(description["pre_tokenizer"]))
        raise ValueError(
            f"the tokenizer's type is {model.get('type')} (pre-tokenizer: {before}); it must be "
            "byte-level BPE, SentencePiece's BPE with byte_fallback, or single characters"
        )

    names = byte_symbols() if prefix is None else [f"<0x{byte:02X}>" for byte in range(256)]
    known = {*ordinary}
    missing = {byte for byte, name in enumerate(names) if name not in known}
    if prefix is None:
        missing -= _NEVER_IN_UTF8 | OPTIONAL_BYTES.keys()
    if missing:
        raise ValueError(
            f"the vocabulary must have a token for each of the 256 bytes, or text would be lost; "
            f"it lacks {len(missing)}, the first is 0x{min(missing):02X}"
        )
    if prefix is not None:
        for name in ordinary:
            if SPACE in name.lstrip(SPACE):  # a long text could not be split at its spaces
                raise ValueError(f"the token {name!r:.60} has a space inside; none may have")
        return SentencePieceEncoder(tokens, description, library)
    is_all_special = all(token.get("special") for token in added)
    is_bytes = len(ordinary) == 256 and is_all_special and not model.get("merges")
    if is_bytes and split_of(description) == "gpt2":
        return ByteEncoder(tokens, description, library)
    return BpeEncoder(tokens, description, library)


def _encode_with_tokenizers(library: LibraryTokenizer, text: str) -> Ids:
    return np.asarray(library.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _encode_with_fastokens(fast: fastokens.Tokenizer, text: str) -> Ids:
    # A flat batch, so that no Python object is created for a token. Special tokens in the text are
    # encoded as text.
    ids, _ = fast.encode_batch_flat([text], split_special_tokens=True)
    return np.frombuffer(ids, dtype="<u4").astype(np.int64)


def load_fastokens(library: LibraryTokenizer) -> fastokens.Tokenizer | None:
    """Load the same tokenizer into fastokens, which is many times faster; None if it cannot read
    it, or gives other ids for PROBE."""
    try:
        fast = fastokens.Tokenizer.from_json_str(library.to_str())
        is_equal = np.array_equal(
            _encode_with_fastokens(fast, PROBE), _encode_with_tokenizers(library, PROBE)
        )
    except BaseException as error:
        # A panic of a Rust library is not an Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        return None
    return fast if is_equal else None
