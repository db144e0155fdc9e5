"""Documents, problems, and the report of a reading: what all readers of files create."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

MAX_RECORD_BYTES = 1 << 26
"""A longer record is skipped: no document has 64 MiB, and a decompression bomb never ends."""
MAX_DETAILED_PROBLEMS = 100
"""Problems kept with their place; later ones are only counted, so that a file in which every line
is wrong cannot fill the memory."""
Counter = Literal["n_skipped_files", "n_skipped_records", "n_repaired", "n_partial_files"]
"""Fields of a report that count problems."""
MAX_PLACES = 20
"""Files that are named for one reason why something is not in the text."""


def with_newlines(text: str) -> str:
    """Replace other ends of lines by newlines."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


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

    @property
    def place(self) -> str:
        """File, line and byte."""
        place = self.file
        if self.line is not None:
            place += f", line {self.line}"
        if self.offset is not None:
            place += f", byte {self.offset}"
        return place

    @property
    def kind(self) -> str:
        """The reason without numbers and details: equal for problems of one kind."""
        return re.sub(r"\d[\d,]*", "N", re.split(r"(?<!skipped)[:;]| at byte", self.reason)[0])

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(slots=True)
class Omission:
    """What is not in the text for reasons of one kind."""

    reason: str
    """The first of them."""
    unit: str = "file"
    n: int = 0
    n_bytes: int = 0
    """On disk; of records an estimate; 0 if it is unknown, as of a file that is cut off."""
    places: list[str] = field(default_factory=list)
    """The first in each of the first MAX_PLACES files."""
    is_read: bool = False
    """Whether it is in the text as it stands, marks and all."""

    def line(self, n_all_bytes: int) -> str:
        """The number, the share of all bytes, the reason and the places."""
        comma = "; " if self.unit == "record" else ", "
        names = comma.join([*self.places, "..."][: self.n])
        share = f", {_percent(self.n_bytes, n_all_bytes)} of the bytes" if self.n_bytes else ""
        reason = self.reason.removeprefix("skipped: ")
        return f"{self.n:,} {self.unit}{'s' * (self.n != 1)}{share}: {reason} ({names})"


def _percent(part: int, total: int) -> str:
    return f"{100 * part / max(total, 1):.3g} %"


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
    """Documents in which bytes or characters were replaced by U+FFFD, or a quotation mark that no
    other one closes was kept."""
    n_partial_files: int = 0
    """Compressed files that end too early; the readable part was kept."""
    n_problems: int = 0
    text_field: str | None = None
    """The field that the user named as text."""
    document_separator: str | None = None
    """What divides the documents of a text file."""
    text_fields: dict[str, str] = field(default_factory=dict)
    """For each of the first files of records: the field that was read as text, or several, joined
    by a comma."""
    field_details: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For the same files: `percent` of the letters of the first records that these fields have, the
    other fields that are `left_out`, all as a text_field (`joined`), and whether it is `html`."""
    omitted: dict[str, Omission] = field(default_factory=dict)
    """What is not in the text, by `Problem.kind`."""
    problems: list[Problem] = field(default_factory=list)
    on_problem: Callable[[Problem], None] | None = None
    """Called with every problem, also with those beyond MAX_DETAILED_PROBLEMS."""
    strict: bool = False
    """Whether the first problem is a ValueError."""

    def add(
        self, problem: Problem, *, counter: Counter | None = None, is_allowed: bool = False
    ) -> None:
        """Record a problem and add 1 to `counter`; if `strict`, raise StrictError instead, unless
        the problem is allowed."""
        if self.strict and not is_allowed:
            raise StrictError(f"{problem} (with --strict nothing is skipped or repaired)")
        self.n_problems += 1
        if counter != "n_repaired":
            units = {"n_skipped_records": "record", "n_partial_files": "cut-off file"}
            unit = units.get(str(counter), "file")
            place = problem.place if unit == "record" else problem.file
            self.omit(problem.kind, Omission(problem.reason, unit, n=1, places=[place]))
        if counter is not None:
            setattr(self, counter, getattr(self, counter) + 1)
        if self.on_problem is not None:
            self.on_problem(problem)
        if len(self.problems) < MAX_DETAILED_PROBLEMS:
            self.problems.append(problem)

    def omit(self, kind: str, omission: Omission) -> None:
        """Add to what is not in the text."""
        if kind not in self.omitted and len(self.omitted) >= MAX_DETAILED_PROBLEMS:
            kind = "other reasons"
        empty = replace(omission, n=0, n_bytes=0, places=[])
        total = self.omitted.setdefault(kind, empty)
        total.n += omission.n
        total.n_bytes += omission.n_bytes
        files = {place.partition(", line ")[0] for place in total.places}
        new = [place for place in omission.places if place.partition(", line ")[0] not in files]
        total.places += new[: MAX_PLACES - len(total.places)]

    def merge(self, other: ReadingReport) -> None:
        """Add the report of other files, as if they had been read after these."""
        for each in fields(other):
            count = getattr(other, each.name)
            if type(count) is int:
                setattr(self, each.name, getattr(self, each.name) + count)
        self.text_field = self.text_field or other.text_field
        for kind, omission in other.omitted.items():
            self.omit(kind, omission)
        self.problems += other.problems[: MAX_DETAILED_PROBLEMS - len(self.problems)]
        for file, name in other.text_fields.items():
            if len(self.text_fields) < MAX_DETAILED_PROBLEMS:
                self.text_fields[file] = name
                self.field_details[file] = other.field_details[file]

    def facts(self) -> dict[str, str]:
        """What a user should know of a reading, as labels and values of one or more lines."""
        facts = {}
        notes = sorted(self.omitted.values(), key=lambda each: -each.n_bytes)
        omissions = [each.line(self.n_read_bytes) for each in notes if not each.is_read]
        n_omitted = sum(each.n_bytes for each in notes if not each.is_read)
        share = f"{_percent(n_omitted, self.n_read_bytes)} of the bytes of {self.n_files:,} files"
        if omissions:
            facts["skipped"] = "\n".join([f"{share}:"][: len(omissions) - 1] + omissions)
        warnings = [e.line(self.n_read_bytes) for e in notes if e.unit == "header"]
        marks = [e.line(self.n_read_bytes) for e in notes if e.is_read and e.unit != "header"]
        if marks:
            facts["as it is"] = "\n".join(marks)
        if self.n_repaired:
            how = "bytes replaced by U+FFFD, or a stray quotation mark kept"
            facts["repaired"] = f"{self.n_repaired:,} documents: {how}"
        if self.text_fields:
            how = f"named as {self.text_field!r}" if self.text_field else "guessed"
            fields = map(self._field, dict.fromkeys(self.text_fields.values()))
            facts["field"] = f"{how}: " + "\n".join(fields)
        if 2 * n_omitted > self.n_read_bytes:
            warnings.append(f"most of the source is not in the text: {share} was skipped")
        if warnings:
            facts["warning"] = "\n".join(warnings)
        return facts

    def _field(self, name: str) -> str:
        every = self.field_details
        files = [file for file, each in self.text_fields.items() if each == name]
        # First the file of which the field is the smallest part; others if it is not half of them.
        files.sort(key=lambda file: every[file]["percent"])
        details = every[files[0]]
        named = files[:1] + [f for f in files[1:MAX_PLACES] if every[f]["percent"] < 50]
        # Without the name of a single file: a run whose text was moved has equal facts.
        place = f" (least in {', '.join(named)})" if self.n_files > 1 else ""
        text = f"{name!r}{place}, {details['percent']:.3g} % of the letters"
        if details["left_out"]:
            others = ", ".join(details["left_out"])
            joins = f" (text_field {details['joined']} joins them)"
            text += f", without {others}{joins * (details['joined'] != name)}"
        if any(every[file]["html"] for file in files):
            text += f", as HTML (text_field html:{name} takes its text)"
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
        omitted = {kind: Omission(**each) for kind, each in content["omitted"].items()}
        return ReadingReport(**content | {"problems": problems, "omitted": omitted})
