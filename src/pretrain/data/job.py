"""A preparation on disk: its settings, and the folder in which every step leaves what it made.

A step is done in units that hang on nothing but the results of earlier steps, so that anyone who
sees the folder can do any unit: this process, several, or many machines. A unit appears under its
name when it is whole, in one rename; what a killed process had begun is done again, and what is
there stays. So the bytes do not hang on who worked, how many, or how often they were stopped.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.config import CorpusConfig
from pretrain.fileio import sync_tree, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is asked of a preparation."""

    sources: tuple[str, ...]
    tokenizer: str = "bpe"
    vocab_size: int | None = None
    text_field: str | None = None
    val_fraction: float | None = None
    strict: bool = False
    corpus: CorpusConfig = field(default_factory=CorpusConfig)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Settings:
        """The settings of which `asdict` and JSON made `content`."""
        corpus: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in content["corpus"].items()
        }
        sources = tuple(content["sources"])
        return Settings(**content | {"sources": sources, "corpus": CorpusConfig(**corpus)})


@dataclass(frozen=True, slots=True)
class Part:
    """Some documents of the corpus, one after the other in one file of `corpus.parts`."""

    documents: Path
    keys: Path
    source: str
    """The source, as it was given, that all of them come from."""
    first_document: int
    """Number of its first document in the order of the corpus."""
    n_documents: int


@dataclass(frozen=True, slots=True)
class Selected:
    """What is to be compared of one part."""

    first_document: int
    """Number of its first document in the order of the corpus."""
    n_records: int
    """Hashes of its documents."""


Work = Callable[["Job", int, Path], None]
"""Does one unit: the job, the unit's number, and the folder for what it makes."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a preparation."""

    name: str
    title: str
    """What people are told, as in "encoding"."""
    n_units: Callable[[Job], int]
    """How many units it has, once the steps before are done."""
    work: Work


def discard(folder: Path) -> None:
    """Remove a job's folder in one step, so that a kill leaves no job of which a part is gone; and
    what is left of one whose removal was cut off."""
    trash = folder.with_name(f"{folder.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


class Job:
    """The folder of a preparation under way."""

    def __init__(self, folder: Path) -> None:
        """Open one that `begin` began."""
        self.folder = folder
        content = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        self.settings = Settings.from_dict(content["settings"])
        self.on_fraction: Callable[[float], None] | None = None
        """Told by a long unit how much of it is done, 0 to 1."""

    @staticmethod
    def begin(folder: Path, settings: Settings, *, key: str) -> Job:
        """Open the job in `folder` if it is the same one, else begin it anew."""
        if not Job.is_begun(folder, key=key):
            discard(folder)
            os.makedirs(folder)
            temporary = folder / "job.tmp"
            write_json(temporary, {"key": key, "settings": asdict(settings)}, ascii_only=True)
            os.rename(temporary, folder / "job.json")
        return Job(folder)

    @staticmethod
    def is_begun(folder: Path, *, key: str) -> bool:
        """Whether the job of this key lies in `folder`."""
        try:
            content = json.loads((folder / "job.json").read_text(encoding="utf-8"))
            return bool(content["key"] == key)
        except (OSError, ValueError, KeyError):
            return False

    def remove_unfinished(self) -> None:
        """Remove what killed processes left of units; nobody else may be at work."""
        for path in self.folder.glob("*/*.*-*"):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder."""
        discard(self.folder)

    def place(self, step: str, unit: int = 0) -> Path:
        """Where a unit leaves what it makes."""
        return self.folder / step / f"{unit:06}"

    def do(self, step: Step, unit: int) -> None:
        """Do a unit unless it is done."""
        place = self.place(step.name, unit)
        if place.is_dir():
            return
        place.parent.mkdir(exist_ok=True)
        temporary = place.with_name(f"{place.name}.{os.getpid()}-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            step.work(self, unit, temporary)
            sync_tree(temporary)
            os.rename(temporary, place)
        except OSError:
            # Somebody else was quicker; what they made is the same.
            if not place.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def report_of(self, step: str, unit: int = 0) -> dict[str, Any]:
        """The report.json of a unit."""
        path = self.place(step, unit) / "report.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    @cached_property
    def n_groups(self) -> int:
        """Groups of files that are read as one unit."""
        return int(self.report_of("list")["n_groups"])

    @cached_property
    def read_parts(self) -> list[Part]:
        """The parts that were read, in the order of the corpus."""
        return self._parts("read", self.n_groups)

    @cached_property
    def parts(self) -> list[Part]:
        """The parts that are left where documents were removed for what they say."""
        if not self.settings.corpus.looks_at_text:
            return self.read_parts
        return self._parts("select", len(self.read_parts))

    @cached_property
    def selected(self) -> list[Selected]:
        """What each unit of the step `select` left to be compared."""
        found: list[Selected] = []
        first = 0
        for unit in range(len(self.read_parts)):
            report = self.report_of("select", unit)
            found.append(Selected(first, report["n_records"]))
            first += report["n_documents"]
        return found

    def _parts(self, step: str, n_units: int) -> list[Part]:
        parts: list[Part] = []
        first = 0
        for unit in range(n_units):
            report, place = self.report_of(step, unit), self.place(step, unit)
            for number, count in enumerate(report["parts"]):
                part = place / f"{number}.part", place / f"{number}.keys.npy"
                parts.append(Part(*part, report["source"], first, count))
                first += count
        return parts

    @property
    def n_documents(self) -> int:
        """Documents in `parts`."""
        return self.parts[-1].first_document + self.parts[-1].n_documents if self.parts else 0

    def doubles_of(self, part: Part) -> NDArray[np.uint8]:
        """Which documents of a part are like an earlier one, shape (n_documents,): 0 none, 1 equal,
        2 nearly equal."""
        if self.settings.corpus.deduplicate == "none":
            return np.zeros(part.n_documents, np.uint8)
        doubles = np.load(self.place("join") / "doubles.npy", mmap_mode="r")
        return np.array(doubles[part.first_document : part.first_document + part.n_documents])
