"""A prepared folder on disk: its manifest, and two streams of token ids that are read by position.

`writer` writes it, and ids come out of `open_prepared(folder).split("train").read(start, stop)`.
ValueError, with the name of the file, for another format or version, a damaged manifest, a file of
the wrong size, ids outside the vocabulary, and a tokenizer that is not the one that wrote the ids;
`verify` reads everything and names the block that differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.data.order import MixtureOrder, Order, ceil_div
from pretrain.fileio import read_json, write_json
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer

FORMAT = "pretrain-shards"
FORMAT_VERSION = 4
MANIFEST_NAME = "manifest.json"

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "val")

# Magic, format version, bytes per id, number of ids; then zeros up to 64 bytes, which align the
# ids.
HEADER = struct.Struct("<8sIIQ40x")
MAGIC = b"PTSHARD\0"


def id_bytes(vocab_size: int) -> int:
    """Bytes of an id on disk: 2 for a vocabulary of up to 65,536 tokens, else 4."""
    return 2 if vocab_size <= 1 << 16 else 4


# The manifest -------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class SourceShare:
    """The documents of one source in a stream, which are consecutive."""

    source: str
    n_documents: int = 0
    n_tokens: int = 0
    """With end-of-text tokens; the stream has one more, before the first source."""
    n_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamInfo:
    """What the manifest records of one stream."""

    file: str
    offsets_file: str
    documents_file: str
    """A line of JSON for each document: where it came from."""
    n_tokens: int
    n_documents: int
    n_bytes: int
    """Bytes of text (UTF-8) behind the tokens."""
    max_id: int
    sha256: str
    """Of the ids as stored, without the header."""
    offsets_sha256: str
    documents_sha256: str
    sources: list[SourceShare]
    """In the order of the stream."""
    block_bytes: int
    block_checksums: list[int]
    """CRC-32 of each `block_bytes` of ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json of a prepared folder."""

    format: str
    format_version: int
    package_version: str
    vocab_size: int
    id_bytes: int
    """2 or 4: ids are unsigned, little-endian."""
    start_of_text: int
    """Comes before each document if it is not end_of_text, which then only comes after it."""
    end_of_text: int
    tokenizer_sha256: str
    source_sha256: str
    """Hash of the documents' texts in their order, whatever files they came from."""
    split_policy: str
    """"documents": complete documents are validation; "tails": the end of each document is."""
    settings: dict[str, Any]
    streams: dict[str, StreamInfo] = field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, the last file of a prepared folder."""
    write_json(folder / MANIFEST_NAME, asdict(manifest))


def read_manifest(path: Path) -> Manifest:
    """Read and check manifest.json."""
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: is not a folder that `pretrain prepare` wrote")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {content.get('format_version')!r}, but this package reads "
            f"{FORMAT_VERSION}; prepare the data again"
        )
    try:
        streams = {name: _stream_info(value) for name, value in content["streams"].items()}
        if set(streams) != set(SPLITS):
            raise ValueError(f"streams are {sorted(streams)}")
        return Manifest(**{**_checked_fields(Manifest, content), "streams": streams})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: is damaged: {error}") from error


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is a folder written by `prepare`, complete or damaged."""
    try:
        return read_json(Path(path) / MANIFEST_NAME).get("format") == FORMAT
    except (OSError, ValueError):
        return False


def _stream_info(content: Mapping[str, Any]) -> StreamInfo:
    info = StreamInfo(**_checked_fields(StreamInfo, content))
    shares = [SourceShare(**_checked_fields(SourceShare, share)) for share in content["sources"]]
    if 1 + sum(share.n_tokens for share in shares) != info.n_tokens:
        raise ValueError("the tokens of the sources are not those of the stream")
    return replace(info, sources=shares)


_JSON_TYPES = {"int": int, "str": str, "list[int]": list, "list[SourceShare]": list}


def _checked_fields(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass from JSON that anybody may have edited; KeyError or ValueError."""
    values: dict[str, Any] = {}
    for each in fields(kind):
        value = values[each.name] = content[each.name]
        is_valid = type(value) is _JSON_TYPES.get(str(each.type), dict)
        if is_valid and each.type == "int":
            is_valid = value >= (1 if each.name == "block_bytes" else 0)
        if is_valid and each.type == "list[int]":
            is_valid = all(type(item) is int for item in value)
        if is_valid and each.name in ("file", "offsets_file", "documents_file"):
            is_valid = os.path.basename(value) == value  # no path that leaves the folder
        if not is_valid:
            raise ValueError(f"{each.name} is {value!r:.80}")
    return values


# The origin of documents --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one document came from: a line of `documents_file`."""

    id: str
    file: str
    """Path of the file, relative to the source that was read."""
    offset: int
    """Where the document starts in its (decompressed) file, in bytes."""
    title: str


def find_origins(
    path: Path, matches: Callable[[int, Origin], bool]
) -> Iterator[tuple[int, Origin]]:
    """Yield number and origin of each document that `matches`, in the order of the stream."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            try:
                origin = Origin(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: line {number + 1} is damaged: {error}") from None
            if matches(number, origin):
                yield number, origin


# Streams ------------------------------------------------------------------------------------------


class TokenStream:
    """One opened stream of token ids, which stays on disk."""

    def __init__(self, folder: Path, info: StreamInfo, *, vocab_size: int) -> None:
        """Open the files and check kind, size and range; ValueError with the name of the file."""
        self._path = folder / info.file
        self._offsets_path = folder / info.offsets_file
        self._documents_path = folder / info.documents_file
        self._info = info
        self._vocab_size = vocab_size
        self._dtype = np.dtype(f"<u{id_bytes(vocab_size)}")
        self.n_tokens = info.n_tokens
        """Number of ids, with end-of-text tokens."""
        self.n_documents = info.n_documents
        self.n_bytes = info.n_bytes
        """Bytes of text (UTF-8) behind the stream; an end-of-text token has 0."""
        self.sources = info.sources
        """The documents of each source, in the order of the stream."""
        self.sha256 = info.sha256
        """Hash of the ids as stored."""
        self._check_files()
        # Not a memory map: what was read through one counts as this process's memory, a window of
        # 512 bytes makes the disk read 100 kB around it, and a truncated file kills with SIGBUS.
        self._file: BinaryIO = open(self._path, "rb", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    @property
    def document_offsets(self) -> NDArray[np.int64]:
        """Shape (n_documents + 1,): document d is ids [o[d], o[d + 1]), with the end-of-text token
        that closes it."""
        return np.fromfile(self._offsets_path, dtype="<i8").astype(np.int64)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read ids [start, stop), shape (stop - start,).

        Threads and forked processes may share a stream, except on Windows, which cannot read by
        position. ValueError for a range outside the stream or a damaged file.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(
                f"{self._path}: ids to read must be in 0 to {self.n_tokens} (requested {start} to "
                f"{stop})"
            )
        position = HEADER.size + start * self._dtype.itemsize
        n_left = (stop - start) * self._dtype.itemsize
        stored = b""
        while n_left:  # a read may return less than requested
            if hasattr(os, "pread"):
                piece = os.pread(self._file.fileno(), n_left, position)
            else:
                self._file.seek(position)
                piece = self._file.read(n_left)
            if not piece:
                raise ValueError(
                    f"{self._path}: ends at byte {position:,}: the file was truncated after it was "
                    "opened; prepare the data again"
                )
            stored += piece
            position += len(piece)
            n_left -= len(piece)
        ids = np.frombuffer(stored, self._dtype).astype(np.int64)
        if ids.size and ids.max() >= self._vocab_size:
            raise ValueError(
                f"{self._path}: id {int(ids.max())} at {start + int(ids.argmax())} is outside the "
                f"vocabulary of {self._vocab_size}: the file is damaged; prepare the data again"
            )
        return ids

    def origins(self, matches: Callable[[int, Origin], bool]) -> Iterator[tuple[int, Origin]]:
        """Yield number and origin of each document that `matches`, in the order of the stream."""
        return find_origins(self._documents_path, matches)

    def verify(self) -> None:
        """Read the full stream and compare all checksums; ValueError names file and block."""
        ids_hash = hashlib.sha256()
        with open(self._path, "rb") as file:
            file.seek(HEADER.size)
            for number, expected in enumerate(self._info.block_checksums):
                block = file.read(self._info.block_bytes)
                ids_hash.update(block)
                if zlib.crc32(block) != expected:
                    start = HEADER.size + number * self._info.block_bytes
                    raise ValueError(
                        f"{self._path}: block {number} (bytes {start} to {start + len(block)}) is "
                        f"damaged: CRC-32 {zlib.crc32(block):08x}, expected {expected:08x}; "
                        "prepare the data again"
                    )
        if ids_hash.hexdigest() != self._info.sha256:
            raise ValueError(
                f"{self._path}: the ids are not those of the manifest (sha256 differs)"
            )
        for path, expected_hash in (
            (self._offsets_path, self._info.offsets_sha256),
            (self._documents_path, self._info.documents_sha256),
        ):
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected_hash:
                    raise ValueError(f"{path}: damaged (sha256 differs); prepare the data again")

    def _check_files(self) -> None:
        info = self._info
        width = self._dtype.itemsize
        n_bytes = _file_size(self._path)
        expected = HEADER.size + info.n_tokens * width
        if n_bytes != expected:
            raise ValueError(
                f"{self._path}: has {n_bytes:,} bytes, expected {expected:,}: the file is "
                f"{'truncated' if n_bytes < expected else 'too long'}; prepare the data again"
            )
        with open(self._path, "rb") as file:
            magic, version, stored_width, n_ids = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC:
            raise ValueError(f"{self._path}: not a shard of pretrain (it begins with {magic!r})")
        for name, value, expected in (
            ("format version", version, FORMAT_VERSION),
            ("bytes per id", stored_width, width),
            ("number of ids", n_ids, info.n_tokens),
            (
                "number of checksums in the manifest",
                len(info.block_checksums),
                ceil_div(info.n_tokens * width, info.block_bytes),
            ),
        ):
            if value != expected:
                raise ValueError(f"{self._path}: {name} is {value}, expected {expected}")
        if info.max_id >= self._vocab_size:
            raise ValueError(
                f"{self._path}: has id {info.max_id}, but the vocabulary has only "
                f"{self._vocab_size} tokens"
            )
        n_bytes = _file_size(self._offsets_path)
        expected = 8 * (info.n_documents + 1)
        if n_bytes != expected:
            raise ValueError(f"{self._offsets_path}: has {n_bytes:,} bytes, expected {expected:,}")


def _file_size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


class PreparedData:
    """An opened prepared folder."""

    _tokenizer: Tokenizer | None = None

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._streams: Mapping[str, TokenStream] = {
            name: TokenStream(folder, info, vocab_size=manifest.vocab_size)
            for name, info in manifest.streams.items()
        }

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the ids; the same object each time."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder / "tokenizer")
        vocab_size = self._tokenizer.vocab_size
        if vocab_size != self.manifest.vocab_size:
            raise ValueError(
                f"{self.folder}: the tokenizer has {vocab_size} tokens, but the manifest has "
                f"{self.manifest.vocab_size}"
            )
        return self._tokenizer

    def split(self, name: SplitName) -> TokenStream:
        """The stream "train" or "val"."""
        if name not in self._streams:
            raise ValueError(f"split must be one of {', '.join(self._streams)} (got {name!r})")
        return self._streams[name]

    @property
    def min_source_tokens(self) -> int:
        """Tokens of the shortest text that windows are cut from."""
        return self._streams["train"].n_tokens

    def order(
        self, *, context_length: int, seed: int, steps: int = 1, batch_size: int = 1
    ) -> Order | MixtureOrder:
        """The order in which a run reads the training text."""
        return Order(self._streams["train"].n_tokens, context_length, seed)

    def verify(self) -> None:
        """Read everything and compare all checksums; ValueError names what differs."""
        for stream in self._streams.values():
            stream.verify()


def open_prepared(folder: str | Path) -> PreparedData:
    """Open a prepared folder and check everything that can be checked without reading the ids.

    Raises ValueError naming the file if it is missing, truncated, of another kind, or contradicts
    the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST_NAME)
    file = folder / "tokenizer" / "tokenizer.json"
    try:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    if sha256 != manifest.tokenizer_sha256:
        raise ValueError(
            f"{file}: is not the tokenizer that wrote these ids (sha256 {sha256[:12]}, expected "
            f"{manifest.tokenizer_sha256[:12]}); prepare the data again"
        )
    return PreparedData(folder, manifest)
