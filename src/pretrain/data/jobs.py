"""A preparation in progress on disk.

A job is a folder with settings. Its stages are divided into tasks that depend only on the results
of earlier stages, so anyone who sees the folder can run any task: this process, a pool, or many
machines. The results of a task get their name in one rename when they are complete; what a killed
process had begun is done again, and what is complete stays. So the bytes do not depend on who
worked, how many, or how often they were stopped.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.config import CorpusConfig
from pretrain.corpus.documents import Document
from pretrain.corpus.duplicates import text_hash
from pretrain.data.config import Fold, ValFraction
from pretrain.fileio import read_json, sync_tree
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer
from pretrain.validation import Checked, convert

JOB_VERSION = 4
"""Of the files inside a job's folder; a job of another version is started from scratch."""

SHARD_TEXT_BYTES = 1 << 23
SHARD_DOCUMENTS = 1 << 16

KEY = np.dtype([("hash", "<u8"), ("check", "<u8"), ("n_bytes", "<u8")])
"""One document: the two numbers of `text_hash`, and the bytes of its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Checked):
    """The arguments of a preparation."""

    section = "prepare"

    sources: tuple[str, ...]
    tokenizer: str = "bpe"
    vocab_size: int | None = None
    text_field: str | None = None
    document_separator: str | None = None
    val_fraction: ValFraction = None
    fold: Fold = 0
    strict: bool = False
    corpus: CorpusConfig = field(default_factory=CorpusConfig)


@dataclass(frozen=True, slots=True)
class DocumentShard:
    """Consecutive documents of one source, in one file of `write_document_shards`."""

    documents: Path
    keys: Path
    source: str
    first_document: int
    """Number of its first document in the order of the corpus."""
    n_documents: int


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a preparation."""

    name: str
    title: str
    """Shown to the user, as in "encoding"."""
    n_tasks: Callable[[Job], int]
    """Its number of tasks, known when the stages before it are complete."""
    work: Callable[[Job, int, Path], None]
    """Runs one task: the job, the number of the task, and an empty folder for its results."""


class Job:
    """The folder of a preparation in progress."""

    def __init__(self, folder: Path) -> None:
        """Open a job that `preparation.begin` has created."""
        self.folder = folder
        content = read_json(folder / "job.json")["settings"]
        self.settings: Settings = convert(content, Settings, "settings")
        self.deduplicates = self.settings.corpus.deduplicate != "none"
        self.on_fraction: Callable[..., object] = lambda fraction, title="": None
        """Called by a long task with the fraction of it that is done, 0 to 1, and what it does if
        that is not the stage's title."""

    def task_folder(self, stage: str, task: int = 0) -> Path:
        """Where a task leaves its results."""
        return self.folder / stage / f"{task:06}"

    def unfinished_tasks(self, stage: Stage) -> list[int]:
        """The numbers of the tasks that have no results yet."""
        tasks = range(stage.n_tasks(self))
        return [task for task in tasks if not self.task_folder(stage.name, task).is_dir()]

    def run_task(self, stage: Stage, task: int) -> None:
        """Run a task unless it has results."""
        folder = self.task_folder(stage.name, task)
        if folder.is_dir():
            return
        folder.parent.mkdir(exist_ok=True)
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            stage.work(self, task, temporary)
            sync_tree(temporary)
            os.rename(temporary, folder)
        except OSError:
            # Another process was faster; its results are the same.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def task_report(self, stage: str, task: int = 0) -> dict[str, Any]:
        """The report.json of a task."""
        return read_json(self.task_folder(stage, task) / "report.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the stage "split" left."""
        return load_tokenizer(self.task_folder("split") / "tokenizer")

    @cached_property
    def n_groups(self) -> int:
        """Number of groups of files, of which each is read by one task."""
        return int(self.task_report("list")["n_groups"])

    @cached_property
    def read_shards(self) -> list[DocumentShard]:
        """The shards that were read, in the order of the corpus."""
        return self._shards("read", self.n_groups)

    @cached_property
    def shards(self) -> list[DocumentShard]:
        """The shards that remain after filtering by text, in the order of the corpus."""
        if not self.settings.corpus.inspects_text:
            return self.read_shards
        return self._shards("filter", len(self.read_shards))

    def _shards(self, stage: str, n_tasks: int) -> list[DocumentShard]:
        shards: list[DocumentShard] = []
        first = 0
        for task in range(n_tasks):
            report = self.task_report(stage, task)
            folder = self.task_folder(stage, task)
            for number, n_documents in enumerate(report["shards"]):
                files = folder / f"{number}.part", folder / f"{number}.keys.npy"
                shards.append(DocumentShard(*files, report["source"], first, n_documents))
                first += n_documents
        return shards

    @cached_property
    def filter_reports(self) -> list[dict[str, Any]]:
        """The reports of the stage "filter", in the order of `read_shards`."""
        return [self.task_report("filter", task) for task in range(len(self.read_shards))]

    def duplicate_marks(self, shard: DocumentShard) -> NDArray[np.uint8]:
        """Which documents of a shard are like an earlier one, shape (n_documents,): 0 no, 1 equal,
        2 nearly equal."""
        if not self.deduplicates:
            return np.zeros(shard.n_documents, np.uint8)
        marks = np.load(self.task_folder("join") / "duplicates.npy", mmap_mode="r")
        return np.array(marks[shard.first_document : shard.first_document + shard.n_documents])


def discard(folder: Path) -> None:
    """Delete a job's folder after a rename, so that a kill never leaves a job of which a part is
    missing; and the rest of one whose deletion was cut off."""
    trash = folder.with_name(f"{folder.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


# Shards of documents. A stream of documents is cut wherever a shard is full, so the shards of a
# corpus are the same whoever writes them. A document is a line of JSON with its id, title and
# origin, followed by the bytes of its text.


def write_document_shards(documents: Iterable[Document], folder: Path) -> list[int]:
    """Write documents as `0.part`, `1.part`, ... with their KEYs in `0.keys.npy`, ...

    Returns the number of documents in each shard: an empty list if there are no documents.
    """
    counts: list[int] = []
    iterator = iter(documents)
    for first in iterator:
        number = len(counts)
        keys: list[tuple[int, int, int]] = []
        n_bytes = 0
        with open(folder / f"{number}.part", "xb") as file:
            for document in chain([first], iterator):
                data = document.text.encode()
                place = (document.source, document.offset)
                header = [document.id, document.title, *place, len(data)]
                file.write(json.dumps(header, ensure_ascii=False).encode() + b"\n")
                file.write(data)
                keys.append((*text_hash(data), len(data)))
                n_bytes += len(data)
                if n_bytes >= SHARD_TEXT_BYTES or len(keys) >= SHARD_DOCUMENTS:
                    break
        np.save(folder / f"{number}.keys.npy", np.array(keys, KEY))
        counts.append(len(keys))
    return counts


def read_document_shard(path: Path) -> Iterator[Document]:
    """Yield the documents of one file of `write_document_shards`."""
    with open(path, "rb") as file:
        while line := file.readline():
            id_, title, source, offset, n_bytes = json.loads(line)
            data = file.read(n_bytes)
            if len(data) < n_bytes:
                raise ValueError(f"{path} ends in the middle of a document; prepare the data again")
            yield Document(id_, data.decode(), title, source, offset)
