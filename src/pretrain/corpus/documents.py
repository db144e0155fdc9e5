"""The plain classes that travel from files to tokens: a document, a problem, and the report of a
reading.

Readers make them and `data.preparation` counts them. Nothing here opens a file; a report refuses
nothing, it only writes down, unless it is strict: then the first problem is a ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

MAX_DETAILED_PROBLEMS = 100
"""Problems kept with their place; further ones are only counted, so a hopeless file cannot fill the
memory."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it comes from."""

    id: str
    """The record's own `id` or the page's address if it has one, else the relative path, with
    `:number` for a record."""
    text: str
    """Newlines are `\\n`; holds no lone surrogate, so it can always be written as UTF-8."""
    title: str = ""
    source: str = ""
    """Path of the file, relative to the source that was read."""
    offset: int = 0
    """Where the document starts in its (decompressed) file, in bytes."""
    source_argument: str = ""
    """The source, as it was given, of which the file is a part."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that was skipped, or repaired, or cut off, and where."""

    file: str
    reason: str
    line: int | None = None
    """Line of a jsonl or csv file, or number of a record, from 1."""
    offset: int | None = None
    """Byte offset from 0 in the decompressed file."""

    def __str__(self) -> str:
        place = self.file
        if self.line is not None:
            place += f", line {self.line}"
        if self.offset is not None:
            place += f", byte {self.offset}"
        return f"{place}: {self.reason}"


@dataclass(slots=True)
class SourceCounts:
    """What one of the given sources held."""

    n_files: int = 0
    n_documents: int = 0
    n_text_bytes: int = 0


@dataclass(slots=True)
class ReadingReport:
    """What a reading found: counts of everything, and the first problems in detail."""

    n_files: int = 0
    n_documents: int = 0
    n_text_bytes: int = 0
    """Bytes of the documents' text in UTF-8."""
    n_read_bytes: int = 0
    """Bytes taken from disk, before decompression; for progress."""
    n_skipped_files: int = 0
    n_skipped_records: int = 0
    n_other_records: int = 0
    """Records of archives that hold no page, such as images."""
    n_repaired: int = 0
    """Documents of which bytes or characters were replaced by U+FFFD."""
    n_partial_files: int = 0
    """Compressed files that end too early; what could be read was kept."""
    n_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    text_fields: dict[str, str] = field(default_factory=dict)
    """For each of the first files of records: the field that was read as text."""
    sources: dict[str, SourceCounts] = field(default_factory=dict)
    """For each source, as it was given."""
    on_problem: Callable[[Problem], None] | None = None
    """Called with every problem, also those beyond MAX_DETAILED_PROBLEMS."""

    def add(self, problem: Problem, *, strict: bool) -> None:
        """Write a problem down; ValueError with its place if `strict`."""
        if strict:
            raise ValueError(f"{problem} (--strict refuses to skip or repair anything)")
        self.n_problems += 1
        if self.on_problem is not None:
            self.on_problem(problem)
        if len(self.problems) < MAX_DETAILED_PROBLEMS:
            self.problems.append(problem)

    def merge(self, other: ReadingReport) -> None:
        """Add what another reading found, as if its files had come after these."""
        for each in fields(self):
            value = getattr(other, each.name)
            if isinstance(value, int):
                setattr(self, each.name, getattr(self, each.name) + value)
        self.problems += other.problems[: MAX_DETAILED_PROBLEMS - len(self.problems)]
        for file, name in other.text_fields.items():
            if len(self.text_fields) < MAX_DETAILED_PROBLEMS:
                self.text_fields[file] = name
        for name, counts in other.sources.items():
            mine = self.sources.setdefault(name, SourceCounts())
            for each in fields(counts):
                setattr(mine, each.name, getattr(mine, each.name) + getattr(counts, each.name))

    @staticmethod
    def from_dict(content: dict[str, Any]) -> ReadingReport:
        """The report of which `as_dict` made `content`."""
        return ReadingReport(
            **content
            | {"problems": [Problem(**problem) for problem in content["problems"]]}
            | {"sources": {name: SourceCounts(**n) for name, n in content["sources"].items()}}
        )

    def summary(self) -> str:
        """One line for people: the counts, and the first problem if there is one."""
        text = (
            f"{self.n_documents:,} documents, {self.n_text_bytes:,} bytes of text from "
            f"{self.n_files:,} files; "
            f"skipped {self.n_skipped_records:,} records and {self.n_skipped_files:,} files, "
            f"repaired {self.n_repaired:,} documents"
        )
        if self.problems:
            text += f"; first problem: {self.problems[0]}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        plain: dict[str, Any] = {
            name: getattr(self, name)
            for name in self.__slots__
            if name not in ("problems", "sources", "on_problem")
        }
        plain["sources"] = {name: asdict(counts) for name, counts in self.sources.items()}
        plain["problems"] = [asdict(problem) for problem in self.problems]
        return plain
