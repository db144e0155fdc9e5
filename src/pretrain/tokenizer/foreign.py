"""Other people's vocabularies -> a library tokenizer: GPT-2's two files, and tiktoken's ranks.

Files come in, checked; what contradicts itself (a merge of tokens that do not exist, a rank twice,
a line that is no rank) is a ValueError with the file and the line. Nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.tokenizer.alphabet import byte_symbols
from pretrain.tokenizer.splits import Split, byte_level_bpe

if TYPE_CHECKING:
    import tokenizers

# By the number of ranks: the pre-split, the entries, and the special tokens that follow the ranks.
_KNOWN: dict[int, tuple[Split, int, dict[str, int]]] = {
    50_256: ("gpt2", 50_257, {"<|endoftext|>": 50_256}),
    100_256: (
        "cl100k",
        100_277,
        {
            "<|endoftext|>": 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
    199_998: ("o200k", 200_019, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}),
    128_000: ("llama3", 128_256, {"<|begin_of_text|>": 128_000, "<|end_of_text|>": 128_001}),
}


def read_gpt2(vocabulary_file: Path, merges_file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of encoder.json and vocab.bpe, also called vocab.json and merges.txt."""
    try:
        vocabulary = json.loads(vocabulary_file.read_text(encoding="utf-8"))
        lines = merges_file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{vocabulary_file} and {merges_file.name}: {error}") from error
    if not (isinstance(vocabulary, dict) and all(type(i) is int for i in vocabulary.values())):
        raise ValueError(f"{vocabulary_file} is not a table of tokens and their ids")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise ValueError(
                    f"{merges_file}, line {number}: merges {left!r} and {right!r}, but {token!r} "
                    f"is not in {vocabulary_file.name}"
                )
        merges.append((left, right))
    if len(set(merges)) < len(merges):
        double = next(merge for merge in merges if merges.count(merge) > 1)
        raise ValueError(f"{merges_file}: merges {double[0]!r} and {double[1]!r} twice")
    special = {name: vocabulary[name] for name in ("<|endoftext|>",) if name in vocabulary}
    return byte_level_bpe(vocabulary, merges, split="gpt2", special=special)


def read_tiktoken(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file of ranks, one base64 token and its rank a line; the pre-split and the
    special tokens are those of the known vocabulary with as many ranks."""
    ranks = _read_ranks(file)
    if len(ranks) not in _KNOWN:
        raise ValueError(
            f"{len(ranks):,} ranks are none of the known vocabularies, so nobody can tell "
            f"how they split text; known are {', '.join(f'{n:,}' for n in _KNOWN)}"
        )
    split, n_entries, special = _KNOWN[len(ranks)]
    symbols = byte_symbols()
    written = {token: "".join(symbols[byte] for byte in token) for token in ranks}
    # Every way to put a token together from two others, the earlier parts first: then the library
    # merges what tiktoken, which merges whatever makes the lowest rank, would merge.
    merges = [
        (written[left], written[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in sorted(
            (
                (token[:cut], token[cut:])
                for cut in range(1, len(token))
                if token[:cut] in ranks and token[cut:] in ranks
            ),
            key=lambda parts: (ranks[parts[0]], ranks[parts[1]]),
        )
    ]
    names = {id_: name for name, id_ in special.items()}
    taken = set(ranks.values())
    # Ids that the original leaves empty get names that no text encodes to.
    for id_ in range(n_entries):
        if id_ not in taken and id_ not in names:
            names[id_] = f"<|reserved_{id_}|>"
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    special = {name: id_ for id_, name in names.items()}
    # tiktoken takes a word that is a token as it is, whether or not merges lead there.
    return byte_level_bpe(vocabulary, merges, split=split, special=special, whole_words=True)


def holds_ranks(file: Path) -> bool:
    """Whether a file begins like tiktoken's ranks."""
    with open(file, "rb") as opened:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", opened.read(200)) is not None


def _read_ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number}: no base64 token and its rank") from None
        if not token or token in ranks or rank in seen or rank < 0:
            raise ValueError(f"line {number}: token {token!r} or rank {rank} is there twice")
        ranks[token] = rank
        seen.add(rank)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the byte 0x{missing[0]:02X} has no rank, so text would be lost")
    return ranks
