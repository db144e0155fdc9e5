"""A prepared folder on disk: its manifest, and two streams of token ids that are read by position.

`writer` writes it, and ids come out of `open_prepared(folder).split("train").read(start, stop)`.
ValueError, with the name of the file, for another format or version, a damaged manifest, a file of
the wrong size, ids outside the vocabulary, and a tokenizer that is not the one that wrote the ids.
Every block of ids is compared with its checksum when it is first read, offsets and origins each
time.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.data.config import DataConfig, SourceConfig
from pretrain.data.order import BLOCK_SAMPLES, MixtureOrder, Order, SourceSpan, ceil_div
from pretrain.fileio import file_sha256, read_json
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer
from pretrain.validation import Matching, Range, convert

FORMAT = "pretrain-shards"
FORMAT_VERSION = 4  # a new key of the manifest needs a new version: unknown ones are rejected
MANIFEST_NAME = "manifest.json"
REPORT_NAME = "report.json"

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


Count = Annotated[int, Range(0)]
FileName = Annotated[str, Matching(r"\w[\w.]*", "the name of a file in the same folder")]


@dataclass(slots=True, kw_only=True)
class SourceShare:
    """The documents of one source in a stream, which are consecutive."""

    source: str
    n_documents: Count = 0
    n_tokens: Count = 0
    """With end-of-text tokens; the stream has one more, before the first source."""
    n_bytes: Count = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamInfo:
    """What the manifest records of one stream."""

    file: FileName
    offsets_file: FileName
    documents_file: FileName
    """A line of JSON for each document: where it came from."""
    n_tokens: Count
    n_documents: Count
    n_bytes: Count
    """Bytes of text (UTF-8) behind the tokens."""
    max_id: Count
    sha256: str
    """Of the ids as stored, without the header."""
    offsets_sha256: str
    documents_sha256: str
    sources: tuple[SourceShare, ...]
    """In the order of the stream."""
    block_bytes: Annotated[int, Range(1)]
    block_checksums: list[int]
    """CRC-32 of each `block_bytes` of ids."""


@dataclass(frozen=True, slots=True)
class Streams:
    """What the manifest records of both streams."""

    train: StreamInfo
    val: StreamInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json of a prepared folder."""

    format: str
    format_version: int
    package_version: str
    vocab_size: Count
    id_bytes: int
    """2 or 4: ids are unsigned, little-endian."""
    start_of_text: Count
    """Comes before each document if it is not end_of_text, which then only comes after it."""
    end_of_text: Count
    tokenizer_sha256: str
    source_sha256: str
    """Hash of the documents' texts in their order, whatever files they came from."""
    split_policy: str
    """"documents": complete documents are validation; "tails": the end of each document is."""
    settings: dict[str, Any]
    streams: Streams


def read_manifest(path: Path) -> Manifest:
    """Read and check manifest.json."""
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {content.get('format')!r}; it must be {FORMAT!r}, a manifest "
            "of `pretrain prepare`"
        )
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {content.get('format_version')!r}; this package reads "
            f"only {FORMAT_VERSION}: prepare the data again"
        )
    try:
        manifest: Manifest = convert(content, Manifest, "manifest")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; prepare the data again") from None
    return manifest


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is a folder written by `prepare`, complete or damaged."""
    try:
        return read_json(Path(path) / MANIFEST_NAME).get("format") == FORMAT
    except (OSError, ValueError):
        return False


def _expect(path: Path, name: str, value: object, expected: object) -> None:
    if value != expected:
        raise ValueError(
            f"{path} is damaged: its {name} must be {expected} (got {value}); delete the prepared "
            "folder that it is in, and prepare the data again"
        )


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


# Streams ------------------------------------------------------------------------------------------


class TokenStream:
    """One opened stream of token ids, which stays on disk."""

    def __init__(self, folder: Path, info: StreamInfo, *, vocab_size: int) -> None:
        """Open the files and check kind, size and range; ValueError with the name of the file."""
        self._path = folder / info.file
        self._offsets_path = folder / info.offsets_file
        self._documents_path = folder / info.documents_file
        self._info = info
        self._verified: set[int] = set()
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
        ids_bytes = info.n_tokens * self._dtype.itemsize
        offsets_bytes = 8 * (info.n_documents + 1)
        sizes = {self._path: HEADER.size + ids_bytes, self._offsets_path: offsets_bytes}
        for file, n_bytes in sizes.items():
            _expect(file, "size in bytes", os.stat(file).st_size, n_bytes)
        os.stat(self._documents_path)  # raises an error if it is missing
        with open(self._path, "rb") as opened:
            header = HEADER.unpack(opened.read(HEADER.size))
        names = ("first bytes", "format version", "bytes per id", "number of ids")
        expected = (MAGIC, FORMAT_VERSION, self._dtype.itemsize, info.n_tokens)
        for name, stored, value in zip(names, header, expected, strict=True):
            _expect(self._path, name, stored, value)
        manifest = self._path.parent / MANIFEST_NAME
        n_blocks = ceil_div(ids_bytes, info.block_bytes)
        _expect(manifest, "number of checksums", len(info.block_checksums), n_blocks)
        # A stream has one id more than its sources: the end-of-text token before the first.
        counts = {"tokens": info.n_tokens - 1, "documents": info.n_documents, "bytes": info.n_bytes}
        for name, n in counts.items():
            n_of_sources = sum(getattr(share, f"n_{name}") for share in info.sources)
            _expect(manifest, f"number of {name} of all sources", n_of_sources, n)
        if info.max_id >= vocab_size:
            raise ValueError(
                f"{self._path} has id {info.max_id}, but ids must be below the {vocab_size} tokens "
                "of the vocabulary; prepare the data again"
            )
        # Not a memory map: what was read through one counts as this process's memory, a window of
        # 512 bytes makes the disk read 100 kB around it, and a truncated file kills with SIGBUS.
        self._file: BinaryIO = open(self._path, "rb", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    @property
    def document_offsets(self) -> NDArray[np.int64]:
        """Shape (n_documents + 1,): document d is ids [o[d], o[d + 1]), with the end-of-text token
        that closes it. ValueError for a damaged file."""
        content = self._offsets_path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        _expect(self._offsets_path, "SHA-256", sha256, self._info.offsets_sha256)
        return np.frombuffer(content, dtype="<i8").astype(np.int64)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read ids [start, stop), shape (stop - start,).

        Threads and forked processes may share a stream, except on Windows, which cannot read by
        position. ValueError for a range outside the stream or a damaged file.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(
                f"{self._path}: ids to read must be in 0 to {self.n_tokens} (got {start} to {stop})"
            )
        first, end = start * self._dtype.itemsize, stop * self._dtype.itemsize
        block_bytes = self._info.block_bytes
        for number in range(first // block_bytes, ceil_div(end, block_bytes)):
            if number not in self._verified:
                self._verify_block(number)
        return np.frombuffer(self._read_bytes(first, end), self._dtype).astype(np.int64)

    def _verify_block(self, number: int) -> None:
        """Compare a block of ids with its checksum; ValueError names file and block."""
        start = number * self._info.block_bytes
        end = min(start + self._info.block_bytes, self.n_tokens * self._dtype.itemsize)
        checksum = zlib.crc32(self._read_bytes(start, end))
        name = f"CRC-32 of block {number} (bytes {HEADER.size + start} to {HEADER.size + end})"
        _expect(self._path, name, checksum, self._info.block_checksums[number])
        self._verified.add(number)

    def _read_bytes(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the ids."""
        stored = b""
        while (n_left := end - start - len(stored)) > 0:  # a read may return less than requested
            position = HEADER.size + start + len(stored)
            if hasattr(os, "pread"):
                piece = os.pread(self._file.fileno(), n_left, position)
            else:
                self._file.seek(position)
                piece = self._file.read(n_left)
            if not piece:
                raise ValueError(
                    f"{self._path} ends at byte {position:,}: it was truncated after it was "
                    "opened; prepare the data again"
                )
            stored += piece
        return stored

    def origins(self) -> Iterator[Origin]:
        """Yield the origin of each document, in the order of the stream."""
        sha256 = file_sha256(self._documents_path)
        _expect(self._documents_path, "SHA-256", sha256, self._info.documents_sha256)
        with open(self._documents_path, encoding="utf-8") as file:
            for line in file:
                yield Origin(**json.loads(line))


class PreparedData:
    """An opened prepared folder."""

    _tokenizer: Tokenizer | None = None

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        infos, size = manifest.streams, manifest.vocab_size
        self._streams: Mapping[str, TokenStream] = {
            name: TokenStream(folder, getattr(infos, name), vocab_size=size) for name in SPLITS
        }
        report = read_json(folder / REPORT_NAME) if (folder / REPORT_NAME).is_file() else {}
        reading = {key: report.get(key) or {} for key in ("n_read_bytes", "omitted", "facts")}
        if not isinstance(reading["facts"], dict):
            raise ValueError(f"{folder / REPORT_NAME} is damaged: facts must be an object")
        self.readings: list[dict[str, Any]] = [reading]
        """What was read and what was skipped: that part of report.json, for each folder."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the ids; the same object each time."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder / "tokenizer")
            n_tokens = self._tokenizer.vocab_size
            _expect(self.folder / MANIFEST_NAME, "vocab_size", self.manifest.vocab_size, n_tokens)
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


def open_prepared(folder: str | Path) -> PreparedData:
    """Open a prepared folder and check everything that can be checked without reading the ids.

    Raises ValueError naming the file if it is missing, truncated, of another kind, or contradicts
    the manifest.
    """
    folder = Path(folder)
    file = folder / "tokenizer" / "tokenizer.json"
    try:
        manifest = read_manifest(folder / MANIFEST_NAME)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        name = "SHA-256 (of the tokenizer that wrote the ids)"
        _expect(file, name, sha256, manifest.tokenizer_sha256)
        return PreparedData(folder, manifest)
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        advice = "; prepare the data again" if is_missing else ""
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}{advice}") from error


# Several sources as one training text. They were prepared together, or are prepared folders of the
# same tokenizer, which are concatenated. Nothing is copied: weights and stages affect the order
# only.

UNKNOWN_STEPS = 1 << 40
"""In place of a number of training steps that is not known yet."""
# How often a text is read that stands on a larger one (docs/notebook), at most half of a half.
OWN_EPOCHS = 4
OWN_SHARE = 0.5


class ConcatenatedStream:
    """Several streams one after the other, with the methods of a `TokenStream`."""

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        *starts, self.n_tokens = accumulate((s.n_tokens for s in streams), initial=0)
        self._parts = list(zip(starts, streams, strict=True))
        self.n_documents = sum(stream.n_documents for stream in streams)
        self.n_bytes = sum(stream.n_bytes for stream in streams)
        hashes = "".join(stream.sha256 for stream in streams)
        self.sha256 = hashlib.sha256(hashes.encode()).hexdigest()

    @property
    def document_offsets(self) -> NDArray[np.int64]:
        """As of a `TokenStream`; the end-of-text token between two streams is counted as the end of
        the document before it."""
        pieces = [stream.document_offsets[:-1] + start for start, stream in self._parts]
        return np.concatenate([*pieces, [self.n_tokens]])

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids [start, stop)."""
        assert 0 <= start <= stop <= self.n_tokens, (start, stop)
        pieces = [np.empty(0, np.int64)]
        for begin, stream in self._parts:
            first, end = max(0, start - begin), min(stop - begin, stream.n_tokens)
            if first < end:
                pieces.append(stream.read(first, end))
        return np.concatenate(pieces)

    def origins(self) -> Iterator[Origin]:
        """As of a `TokenStream`."""
        return chain.from_iterable(stream.origins() for _, stream in self._parts)


class MixedData(PreparedData):
    """Prepared text of several sources, and the weights by which a run reads them."""

    def __init__(self, config: DataConfig, prepared: Sequence[PreparedData]) -> None:
        """`prepared` is one folder of all paths of `config`, or one for each path, in their
        order."""
        first = prepared[0]
        for other in prepared[1:]:
            if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
                raise ValueError(
                    f"data.source: {str(first.folder)!r} and {str(other.folder)!r} have different "
                    "tokenizers; prepare them with --tokenizer and the same one"
                )
        self.folder, self.manifest = first.folder, first.manifest
        self._streams = {
            name: ConcatenatedStream([data.split(name) for data in prepared])  # type: ignore[misc]
            for name in SPLITS
        }
        self._config = config
        self.readings = [reading for data in prepared for reading in data.readings]
        # Where the ids of each path of the config are in the training stream.
        spans: dict[str, SourceSpan] = {}
        end = 0
        if len(prepared) > 1:
            for path, data in zip(config.paths, prepared, strict=True):
                n_tokens = data.split("train").n_tokens
                spans[path] = SourceSpan(path, end, n_tokens)
                end += n_tokens
        else:
            for share in first.split("train").sources:
                if share.n_documents:
                    # A source's first input is the end-of-text token before its first document.
                    spans[share.source] = SourceSpan(share.source, end, share.n_tokens + 1)
                end += share.n_tokens
        for path in config.paths:
            if path not in spans:
                raise ValueError(
                    f"data.source: {path!r} has no text left to train on; remove this source, or "
                    "use fewer filters"
                )
        self.spans = {path: spans[path] for path in config.paths}

    def _entries(self, n_tokens: int) -> Sequence[SourceConfig]:
        """The sources of a run that reads this number of tokens."""
        return self._config.mixture

    @property
    def tokens_for_epochs(self) -> int | None:
        """Tokens of a run that reads every source for the configured number of epochs; None if the
        sources have weights."""
        entries = self._config.mixture
        if any(entry.epochs is None for entry in entries):
            return None
        if len({entry.stage for entry in entries}) > 1:
            raise ValueError(
                "data.source has epochs and stages, so train.steps must be set: a stage begins "
                "after a fraction of the steps"
            )
        return round(sum((e.epochs or 0) * self.spans[e.path].n_tokens for e in entries))

    @property
    def min_source_tokens(self) -> int:
        return min(span.n_tokens for span in self.spans.values())

    def order(
        self, *, context_length: int, seed: int, steps: int = UNKNOWN_STEPS, batch_size: int = 1
    ) -> MixtureOrder:
        """The mixture of a run of `steps` steps with `batch_size` samples each.

        ValueError if the run is too short for its stages, or if it would repeat a source although
        `data.exhausted` is "error".
        """
        entries = self._entries(steps * batch_size * context_length)
        stages: dict[float, dict[str, float]] = {}
        for entry in entries:
            weight = entry.weight or (entry.epochs or 0) * self.spans[entry.path].n_tokens
            stages.setdefault(entry.stage, {})[entry.path] = weight
        beginnings = sorted(stages)
        first_samples = [round(beginning * steps) * batch_size for beginning in beginnings]
        if len({*first_samples, steps * batch_size}) <= len(first_samples):
            raise ValueError(
                f"data.source: {steps} steps are too few for {len(stages)} stages; use more steps"
            )
        weights = [[stages[start].get(path, 0.0) for path in self.spans] for start in beginnings]
        mixture = MixtureOrder(
            [*self.spans.values()],
            stages=list(zip(first_samples, weights, strict=True)),
            context_length=context_length,
            seed=seed,
        )
        # A run of exactly the configured epochs may read a few windows more: steps and shares are
        # rounded.
        max_steps = sum(stages[0.0].values()) / (context_length * batch_size) + 1
        is_single_epoch = (
            len(stages) == 1 and steps < max_steps and all((e.epochs or 2) <= 1 for e in entries)
        )
        if self._config.exhausted == "error" and steps < UNKNOWN_STEPS and not is_single_epoch:
            for path, part in mixture.sources(steps * batch_size).items():
                if part["epochs"] > 1:
                    raise ValueError(
                        f"the run would read {path!r} {part['epochs']:.2f} times, and "
                        "data.exhausted is 'error'; take fewer steps, a smaller weight, or "
                        "data.exhausted repeat"
                    )
        return mixture


class StandingData(MixedData):
    """A text, and a larger one that the run stands on: that is read alone in the first half of the
    steps, and together with the text in the second. Only the text is held out.

    "2 OLMo 2 Furious" (OLMo team, 2025) ends a pre-training like this on chosen texts; what is
    repeated of the larger text keeps the model from forgetting it.
    """

    def __init__(self, config: DataConfig, base: PreparedData, own: PreparedData) -> None:
        assert config.base is not None
        self.names, self.base, self.own = (config.base, config.paths[0]), base, own
        stages = [SourceConfig(path=name, weight=1.0) for name in self.names]
        super().__init__(replace(config, base=None, source=tuple(stages)), [base, own])
        self._streams = {**self._streams, "val": own.split("val")}

    @property
    def tokens_for_epochs(self) -> int:
        """Tokens of a run that reads the larger text once."""
        base, own = (self.spans[name].n_tokens for name in self.names)
        return min(base + OWN_EPOCHS * own, round(base / (1 - OWN_SHARE / 2)))

    def _entries(self, n_tokens: int) -> Sequence[SourceConfig]:
        """As of a mixture in which the text is read OWN_EPOCHS times in the second half."""
        base, own = self.names
        share = min(OWN_SHARE, OWN_EPOCHS * self.spans[own].n_tokens / (n_tokens / 2))
        share = max(share, 1 / BLOCK_SAMPLES)
        return (
            SourceConfig(path=base, weight=1.0),
            SourceConfig(path=base, weight=1.0 - share, stage=0.5),
            SourceConfig(path=own, weight=share, stage=0.5),
        )
