"""A tokenizer.json -> a tokenizer.

A folder or a file comes in. What is missing, too large, no tokenizer.json, or a tokenizer under
which text would be lost, is a ValueError that names the file; nothing in the file is ever executed.
"""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.tokenizer.config import TRAINED_NAMES
from pretrain.tokenizer.tokenizer import FILE_NAME, Tokenizer

MAX_FILE_BYTES = 128 << 20
"""The largest vocabularies in use (256,000 entries) take about 35 MB."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder with a tokenizer.json, or of such a file. Raises ValueError with
    the reason."""
    from tokenizers import Tokenizer as Library

    file = tokenizer_file(path)
    n_bytes = os.stat(file).st_size
    if n_bytes > MAX_FILE_BYTES:
        raise ValueError(
            f"tokenizer file {str(file)!r} has {n_bytes:,} bytes; legal: up to {MAX_FILE_BYTES:,}"
        )
    try:
        with open(file, "rb") as opened:
            text = opened.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer file {str(file)!r} cannot be read: {error}") from error
    try:
        return Tokenizer(Library.from_str(text))
    except ValueError as error:
        raise ValueError(f"{str(file)!r}: {error}") from error
    except BaseException as error:
        # The library raises plain Exception, and on some files its PanicException, which is no
        # Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        raise ValueError(f"{str(file)!r} is no tokenizer.json: {error}") from None


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json behind a path to a folder, a folder with a folder `tokenizer`, or the file
    itself."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        for file in (path / FILE_NAME, path / "tokenizer" / FILE_NAME):
            if file.is_file():
                return file
        raise ValueError(f"folder {str(path)!r} has no {FILE_NAME}")
    raise ValueError(
        f"tokenizer {str(path)!r} does not exist; legal: {', '.join(TRAINED_NAMES)}, a folder "
        f"with a {FILE_NAME}, "
        "or such a file"
    )
