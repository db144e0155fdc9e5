"""Text -> a prepared folder: documents are read, split into training and validation, encoded, and
written.

A source is read three times, each time one document after the other: to count, to train the
tokenizer, and to encode; so memory does not grow with the corpus. The folder appears under its name
only when it is whole. Refused are sources without text, settings that contradict the text, and an
output folder that is not empty.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.documents import Document, ReadingReport
from pretrain.corpus.files import Source, list_files
from pretrain.corpus.reading import read_documents
from pretrain.data.config import check_val_fraction
from pretrain.data.durable import new_folder, refuse_full, write_json
from pretrain.data.encoding import encode_batches
from pretrain.data.manifest import (
    FORMAT,
    FORMAT_VERSION,
    SPLITS,
    Manifest,
    SplitName,
    StreamInfo,
    write_manifest,
)
from pretrain.data.origins import Strangest
from pretrain.data.shards import (
    PreparedData,
    ShardWriter,
    id_bytes,
    is_prepared,
    open_prepared,
)
from pretrain.data.splitting import Census, Split, choose_split
from pretrain.tokenizer.config import TRAINED_NAMES, check_vocab_size
from pretrain.tokenizer.loading import load_tokenizer, tokenizer_files
from pretrain.tokenizer.pieces import pieces
from pretrain.tokenizer.tokenizer import Tokenizer
from pretrain.tokenizer.training import train_tokenizer

Progress = Callable[[str, float], None]
"""Called with the stage ("reading", "training the tokenizer", "encoding") and its fraction done, 0
to 1."""

_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """How to read the documents, any number of times."""

    path: Source
    text_field: str | None
    strict: bool
    progress: Progress | None
    n_disk_bytes: int

    def __str__(self) -> str:
        paths = [self.path] if isinstance(self.path, str | Path) else self.path
        return ", ".join(repr(str(path)) for path in paths)

    def documents(self, *, stage: str, report: ReadingReport | None = None) -> Iterator[Document]:
        # Only the first reading is strict and reported: the others would find the same.
        strict = self.strict and report is not None
        report = report if report is not None else ReadingReport()
        shown = -1.0
        found = read_documents(self.path, text_field=self.text_field, report=report, strict=strict)
        for document in found:
            fraction = min(report.n_read_bytes / max(self.n_disk_bytes, 1), 1.0)
            if self.progress is not None and fraction >= shown + 0.005:
                self.progress(stage, fraction)
                shown = fraction
            yield document
        if self.progress is not None:
            self.progress(stage, 1.0)


def prepare(
    source: Source,
    out: str | Path,
    *,
    tokenizer: str | Path = "bpe",
    vocab_size: int | None = None,
    text_field: str | None = None,
    val_fraction: float | None = None,
    strict: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> PreparedData:
    """Turn a file, a folder, "bundled" or several of them into a prepared folder, and open it.

    `tokenizer` is bpe, characters or bytes, trained here on the training split (characters: on all
    text), gpt2, or the path of one. `workers` processes encode; the bytes do not depend on them.
    `splitting.choose_split` says how validation is chosen.
    Raises ValueError for what cannot be read or asked for, FileExistsError for an `out` in use.
    """
    out = Path(out)
    check_val_fraction(val_fraction)
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    _refuse_prepared(source)
    given = _given_tokenizer(tokenizer, vocab_size)
    refuse_full(out)

    reader = _Reader(
        path=source,
        text_field=text_field,
        strict=strict,
        progress=progress,
        n_disk_bytes=sum(file.n_bytes for file in list_files(source)),
    )
    with new_folder(out) as folder:
        report, found = ReadingReport(), _Found()
        census = _count(reader, report, folder / "problems.jsonl")
        split = choose_split(census, val_fraction=val_fraction)
        made = given if given is not None else _train(reader, split, str(tokenizer), vocab_size)
        made.save(folder / "tokenizer")
        streams = _encode(reader, split, made, census, folder, found, workers)
        settings = {
            "tokenizer": made.kind,
            "tokenizer_is_given": given is not None,
            "vocab_size": vocab_size,
            "text_field": text_field,
            "val_fraction": split.val_fraction,
            "strict": strict,
        }
        write_json(folder / "report.json", _whole_report(report, found, streams))
        write_manifest(folder, _manifest(made, census, split, settings, streams))
    return open_prepared(out)


def _refuse_prepared(source: Source) -> None:
    """Its files would be read as if they were texts."""
    for path in [source] if isinstance(source, str | Path) else source:
        if is_prepared(path):
            raise ValueError(f"{str(path)!r} is prepared already: train on it, or name its texts")


def _manifest(
    tokenizer: Tokenizer,
    census: Census,
    split: Split,
    settings: dict[str, Any],
    streams: dict[str, StreamInfo],
) -> Manifest:
    return Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        package_version=_package_version(),
        vocab_size=tokenizer.vocab_size,
        id_bytes=id_bytes(tokenizer.vocab_size),
        end_of_text=tokenizer.end_of_text,
        tokenizer_sha256=tokenizer.sha256,
        source_sha256=census.sha256,
        split_policy=split.policy,
        settings=settings,
        streams=streams,
    )


def _whole_report(
    report: ReadingReport, found: _Found, streams: Mapping[str, StreamInfo]
) -> dict[str, Any]:
    """report.json: what reading found, and what encoding added to it."""
    content = report.as_dict()
    for name, counts in content["sources"].items():
        counts["n_tokens"] = found.n_tokens[name]
    content["n_tokens"] = {name: info.n_tokens for name, info in streams.items()}
    return {**content, "strangest": found.strangest.found()}


def _count(reader: _Reader, report: ReadingReport, problems: Path) -> Census:
    """The first reading: how many documents and bytes there are, and all that is wrong with
    others."""
    census = Census()
    with open(problems, "x", encoding="utf-8") as file:
        report.on_problem = lambda problem: print(json.dumps(asdict(problem)), file=file)
        for document in reader.documents(stage="reading", report=report):
            census.add(document.text)
    if census.n_documents == 0:
        raise ValueError(f"source {reader} gave no document: {report.summary()}")
    return census


def prepared_key(
    source: Source,
    *,
    tokenizer: str | Path = "bpe",
    vocab_size: int | None = None,
    text_field: str | None = None,
    val_fraction: float | None = None,
    strict: bool = False,
) -> str:
    """A name (64 hex digits) for what `prepare` would make, without reading any text.

    It changes with the settings, the format, the package, and the path, size and time of change of
    each file.
    """
    given: str | None = None
    if str(tokenizer) not in TRAINED_NAMES:
        parts = [file.read_bytes() for file in tokenizer_files(tokenizer)]
        given = hashlib.sha256(b"".join(parts)).hexdigest()
    content = {
        "format": [FORMAT, FORMAT_VERSION, _package_version()],
        "files": [
            [os.path.realpath(file.path), file.n_bytes, os.stat(file.path).st_mtime_ns]
            for file in list_files(source)
        ],
        "tokenizer": given if given is not None else str(tokenizer),
        "vocab_size": vocab_size,
        "text_field": text_field,
        "val_fraction": val_fraction,
        "strict": strict,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _given_tokenizer(tokenizer: str | Path, vocab_size: int | None) -> Tokenizer | None:
    """The tokenizer of a path, or None for a name; ValueError for a size that cannot be."""
    if str(tokenizer) in TRAINED_NAMES:
        check_vocab_size(vocab_size, name=str(tokenizer))
        return None
    given = load_tokenizer(tokenizer)
    if vocab_size is not None and vocab_size != given.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size is {vocab_size}, but {str(tokenizer)!r} has {given.vocab_size} "
            "entries; leave it out"
        )
    return given


def _train(reader: _Reader, split: Split, name: str, vocab_size: int | None) -> Tokenizer:
    """A tokenizer that has not seen validation text, except `characters`, which must be able to
    write it."""
    documents = reader.documents(stage="training the tokenizer") if name != "bytes" else iter(())
    texts = (
        text
        for document in documents
        for part, text in split.parts(document.text)
        if part == "train" or name == "characters"
    )
    return train_tokenizer(texts, name=name, vocab_size=vocab_size)


def _encode(
    reader: _Reader,
    split: Split,
    tokenizer: Tokenizer,
    census: Census,
    folder: Path,
    found: _Found,
    workers: int,
) -> dict[str, StreamInfo]:
    """Write both streams; ValueError if one of them stays empty or the source changed meanwhile."""
    with ExitStack() as opened:
        writers: dict[SplitName, ShardWriter] = {}
        for name in SPLITS:
            writers[name] = ShardWriter(
                folder,
                name=name,
                vocab_size=tokenizer.vocab_size,
                end_of_text=tokenizer.end_of_text,
            )
            opened.callback(writers[name].abandon)

        again = Census()
        for batch, ids in encode_batches(
            _batches(reader, split, again),
            lambda batch: [piece.text for piece in batch],
            tokenizer=tokenizer,
            folder=folder / "tokenizer",
            workers=workers,
        ):
            _write(batch, ids, writers, found)
        if again.sha256 != census.sha256:
            raise ValueError(f"source {reader} changed while it was read; start again")
        for name in SPLITS:
            if writers[name].n_documents == 0:
                raise ValueError(
                    f"corpus too small: {census.n_bytes:,} bytes in {census.n_documents:,} "
                    "documents "
                    f"leave nothing for the split {name!r}; take more text, or longer documents"
                )
        return {name: writers[name].close() for name in SPLITS}


@dataclass(frozen=True, slots=True)
class _Found:
    """What encoding tells about the documents."""

    n_tokens: Counter[str] = field(default_factory=Counter)
    """For each given source, end-of-text tokens aside."""
    strangest: Strangest = field(default_factory=Strangest)


@dataclass(frozen=True, slots=True)
class _Piece:
    split: SplitName
    text: str
    document: Document
    is_last: bool


def _pieces(document: Document, split: Split) -> Iterator[_Piece]:
    """A document in pieces small enough that a text of any length takes little memory to encode."""
    for name, text in split.parts(document.text):
        parts = pieces(text, limit=_BATCH_CHARACTERS)
        waiting = next(parts, None)
        while waiting is not None:
            following = next(parts, None)
            yield _Piece(name, waiting, document, is_last=following is None)
            waiting = following


def _batches(reader: _Reader, split: Split, census: Census) -> Iterator[list[_Piece]]:
    """The pieces of all documents, about _BATCH_CHARACTERS together; counts the documents again."""
    batch: list[_Piece] = []
    n_characters = 0
    for document in reader.documents(stage="encoding"):
        census.add(document.text)
        for piece in _pieces(document, split):
            batch.append(piece)
            n_characters += len(piece.text)
            if n_characters >= _BATCH_CHARACTERS:
                yield batch
                batch, n_characters = [], 0
    yield batch


def _write(
    batch: list[_Piece],
    encoded: list[NDArray[np.int64]],
    writers: Mapping[SplitName, ShardWriter],
    found: _Found,
) -> None:
    for piece, ids in zip(batch, encoded, strict=True):
        writers[piece.split].add(ids, n_bytes=len(piece.text.encode()))
        if piece.is_last:
            n_tokens, n_bytes = writers[piece.split].end_document(piece.document)
            found.n_tokens[piece.document.given] += n_tokens
            found.strangest.add(piece.document, n_tokens=n_tokens, n_bytes=n_bytes)


def _package_version() -> str:
    from pretrain import __version__

    return __version__
