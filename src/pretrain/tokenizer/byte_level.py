"""The pre-splits: how text is cut into words before pairs are merged, and byte-level BPE with one.

A split's name comes in, a library tokenizer goes out. The patterns are facts of the vocabularies
that use them: GPT-2's of Radford et al., 2019; cl100k and o200k of tiktoken's openai_public.py;
llama3 of Llama Team, 2024; smollm, GPT-2's with each digit by itself, of SmolLM (Ben Allal et al.,
2024). They are written for the library's engine, where {1,3}+ is not
possessive and $ is the end of a line.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

if TYPE_CHECKING:
    import tokenizers

Split = Literal["gpt2", "cl100k", "o200k", "llama3", "smollm"]

_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K = "|".join(
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
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's own is built into the library.
_PATTERNS: dict[Split, str] = {"cl100k": _CL100K, "o200k": _O200K, "llama3": _LLAMA3}


def pre_tokenizer(split: Split) -> Any:
    """The library's part that cuts text into words and writes them in GPT-2's byte alphabet."""
    from tokenizers import Regex, pre_tokenizers

    by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "gpt2":
        return by_gpt2
    if split == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_gpt2])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERNS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def split_of(description: Mapping[str, Any]) -> Split | None:
    """The pre-split of a tokenizer.json; None for one that has no name here."""
    import json

    from tokenizers import Tokenizer as Library
    from tokenizers import models

    for split in get_args(Split):
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizer(split)
        if json.loads(library.to_str())["pre_tokenizer"] == description["pre_tokenizer"]:
            return cast(Split, split)
    return None


def byte_level_bpe(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    split: Split,
    added: dict[str, int],
    non_special: Collection[str] = (),
    ignore_merges: bool = False,
) -> tokenizers.Tokenizer:
    """A library tokenizer. With `ignore_merges` a word that is in the vocabulary is taken as it is,
    whether or not merges lead there. Those of `added` that are in `non_special` are not special:
    where a text spells one it is taken."""
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Library

    whole = vocabulary | added
    library = Library(models.BPE(vocab=whole, merges=merges, ignore_merges=ignore_merges))
    library.pre_tokenizer = pre_tokenizer(split)
    library.decoder = decoders.ByteLevel()
    library.add_tokens(
        [
            AddedToken(name, special=name not in non_special, normalized=False)
            for name in sorted(added, key=added.__getitem__)
        ]
    )
    return library


@cache
def byte_symbols() -> tuple[str, ...]:
    """The character of each byte value, 256 of them.

    Printable Latin-1 characters stand for themselves, the other 68 values follow each other from
    U+0100.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols = []
    n_moved = 0
    for value in range(256):
        if value in printable:
            symbols.append(chr(value))
        else:
            symbols.append(chr(0x100 + n_moved))
            n_moved += 1
    return tuple(symbols)


@cache
def symbol_bytes() -> dict[str, int]:
    """The byte value of each character of the alphabet."""
    return {symbol: value for value, symbol in enumerate(byte_symbols())}
