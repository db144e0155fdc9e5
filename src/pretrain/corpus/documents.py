"""Documents, problems, and the report of a reading: what all readers of files create."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

MAX_DETAILED_PROBLEMS = 100
"""Problems kept with their place; later ones are only counted, so that a file in which every line
is wrong cannot fill the memory."""
Counter = Literal["n_skipped_files", "n_skipped_records", "n_repaired", "n_partial_files"]
"""Fields of a report that count problems."""


class StrictError(ValueError):
    """The first problem of a strict report."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its origin."""

    id: str
    """The record's own `id` or the page's URL if it has one, else the relative path, with `:number`
    for a record."""
    text: str
    """Newlines are `\\n`. Never contains a lone surrogate, so it can always be encoded as UTF-8."""
    title: str = ""
    source: str = ""
    """Path of the file, relative to the source that was read."""
    offset: int = 0
    """First byte of the document in its (decompressed) file."""
    source_argument: str = ""
    """The source that contains the file, as the user wrote it."""

    def place(self) -> dict[str, Any]:
        """Where the document is, as JSON."""
        return {"id": self.id, "file": self.source, "offset": self.offset}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that was skipped, repaired or truncated, and its place."""

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
class ReadingReport:
    """Counts of everything that was read, and the first problems in detail."""

    n_files: int = 0
    n_documents: int = 0
    n_text_bytes: int = 0
    """Bytes of the documents' text in UTF-8."""
    n_read_bytes: int = 0
    """Bytes on disk, before decompression, of the files up to the current place; for progress."""
    n_skipped_files: int = 0
    n_skipped_records: int = 0
    n_other_records: int = 0
    """Records of archives that are not pages, such as images."""
    n_repaired: int = 0
    """Documents in which bytes or characters were replaced by U+FFFD."""
    n_partial_files: int = 0
    """Compressed files that end too early; the readable part was kept."""
    n_problems: int = 0
    text_fields: dict[str, str] = field(default_factory=dict)
    """For each of the first files of records: the field that was read as text."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source argument its own n_files, n_documents and n_text_bytes."""
    problems: list[Problem] = field(default_factory=list)
    on_problem: Callable[[Problem], None] | None = None
    """Called with every problem, also with those beyond MAX_DETAILED_PROBLEMS."""
    strict: bool = False
    """Whether the first problem is a ValueError."""

    def add(
        self,
        file: str,
        reason: str,
        *,
        line: int | None = None,
        offset: int | None = None,
        counter: Counter | None = None,
        is_allowed: bool = False,
    ) -> None:
        """Record a problem and add 1 to `counter`; if `strict`, raise StrictError instead, unless
        the problem is allowed."""
        problem = Problem(file, reason, line, offset)
        if self.strict and not is_allowed:
            raise StrictError(f"{problem} (with --strict nothing is skipped or repaired)")
        self.n_problems += 1
        if counter is not None:
            setattr(self, counter, getattr(self, counter) + 1)
        if self.on_problem is not None:
            self.on_problem(problem)
        if len(self.problems) < MAX_DETAILED_PROBLEMS:
            self.problems.append(problem)

    def of_source(self, argument: str) -> dict[str, int]:
        """The totals of one source argument, to be added to."""
        counts = {"n_files": 0, "n_documents": 0, "n_text_bytes": 0}
        return self.sources.setdefault(argument, counts)

    def merge(self, other: ReadingReport) -> None:
        """Add the report of other files, as if they had been read after these."""
        for each in fields(other):
            count = getattr(other, each.name)
            if type(count) is int:
                setattr(self, each.name, getattr(self, each.name) + count)
        self.problems += other.problems[: MAX_DETAILED_PROBLEMS - len(self.problems)]
        for file, name in other.text_fields.items():
            if len(self.text_fields) < MAX_DETAILED_PROBLEMS:
                self.text_fields[file] = name
        for name, counts in other.sources.items():
            total = self.of_source(name)
            for key, count in counts.items():
                total[key] += count

    def summary(self) -> str:
        """One human-readable line: the counts, and the first problem if there is one."""
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
        """Return all fields as plain values for JSON."""
        content = asdict(self)
        del content["on_problem"], content["strict"]
        return content

    @staticmethod
    def from_dict(content: dict[str, Any]) -> ReadingReport:
        """Restore a report from `as_dict`."""
        problems = [Problem(**problem) for problem in content["problems"]]
        return ReadingReport(**content | {"problems": problems})
