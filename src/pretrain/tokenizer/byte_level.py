"""Byte-level BPE: GPT-2's byte alphabet, the known pre-tokenizers, and a tokenizer of both.

A pre-tokenizer cuts text into words, and pairs are only merged inside a word. The regular
expressions are facts of published vocabularies: GPT-2's is from Radford et al., "Language Models
are Unsupervised Multitask Learners", 2019; cl100k and o200k from tiktoken's openai_public.py;
llama3 from Llama Team, 2024; smollm is GPT-2's with single digits, from SmolLM (Ben Allal et al.,
2024). They are written for the regex engine of `tokenizers`, in which {1,3}+ is not possessive and
$ is the end of a line.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from itertools import count
from typing import Any, AnyStr, Literal, cast, get_args

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

Split = Literal["gpt2", "cl100k", "o200k", "llama3", "smollm"]
"""Name of a pre-tokenizer."""

_PATTERNS: dict[Split, str] = {
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""GPT-2's is built into the library."""


@cache
def byte_symbols() -> tuple[str, ...]:
    """The printable character that stands for each byte value in a vocabulary, 256 of them.

    Printable Latin-1 characters stand for themselves; the other 68 values are U+0100, U+0101, ...
    in order. Example: "A" is "A", and the space (0x20) is "Ġ" (U+0120).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(0x100)
    return tuple(chr(value if value in printable else next(others)) for value in range(256))


@cache
def symbol_bytes() -> dict[str, int]:
    """The byte value of each character of `byte_symbols`."""
    return {symbol: value for value, symbol in enumerate(byte_symbols())}


def spelled(data: bytes) -> str:
    """Bytes in the characters of `byte_symbols`."""
    return "".join(map(byte_symbols().__getitem__, data))


def pre_tokenizer(split: Split) -> Any:
    """The library's pre-tokenizer, which also writes words in GPT-2's byte alphabet."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "gpt2":
        return gpt2
    if split == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    words = pre_tokenizers.Split(Regex(_PATTERNS[split]), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, in_bytes])


def split_of(description: Mapping[str, Any]) -> Split | None:
    """The name of a tokenizer.json's pre-tokenizer; None for one that is not known here."""
    for split in get_args(Split):
        if json.loads(pre_tokenizer(split).__getstate__()) == description["pre_tokenizer"]:
            return cast(Split, split)
    return None


def special_token(name: str) -> AddedToken:
    """A token to which no text is encoded."""
    return AddedToken(name, special=True, normalized=False)


def merges_of(tokens: Iterable[AnyStr], ids: Mapping[AnyStr, int]) -> list[tuple[AnyStr, AnyStr]]:
    """List the merges of a vocabulary that only ranks its tokens, as tiktoken's or SentencePiece's.

    These merge whichever pair gives the best token, but the library needs a list of pairs. So all
    ways to split a token into two are in the list, for `tokens` from best to worst: "abc" gives
    (a, bc) and (ab, c) if these are tokens.
    """
    merges = []
    for token in tokens:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def byte_level_bpe(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    split: Split,
    added: dict[str, int],
    non_special: Collection[str] = (),
    ignore_merges: bool = False,
) -> LibraryTokenizer:
    """Create a library tokenizer from tokens in the byte alphabet and their merges in order.

    BPE applies the first possible merge of the list again and again: with the merges (a, b) and
    (ab, c), "abcb" is a b c b -> ab c b -> abc b. With `ignore_merges` a word that is a token is
    used as it is, even if no merges lead to it. `added` tokens are special, except those in
    `non_special`, which are recognised where a text contains them.
    """
    model = models.BPE(vocab=vocabulary | added, merges=merges, ignore_merges=ignore_merges)
    library = LibraryTokenizer(model)
    library.pre_tokenizer = pre_tokenizer(split)
    library.decoder = decoders.ByteLevel()
    library.add_tokens(
        [
            AddedToken(name, special=name not in non_special, normalized=False)
            for name in sorted(added, key=added.__getitem__)
        ]
    )
    return library
