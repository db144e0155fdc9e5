"""What a command prints: text for humans on one stream, one JSON object on the other."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from pretrain.corpus.documents import Document, ReadingReport
from pretrain.corpus.files import Source
from pretrain.corpus.reading import read_documents
from pretrain.fileio import nan_to_null, replace_file


class Output:
    """With `json`, standard output gets exactly one JSON object and standard error all text."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        self._reading: dict[str, Any] = {}

    @property
    def stream(self) -> TextIO:
        """Where text for humans goes."""
        return sys.stderr if self.json else sys.stdout

    def log(self, text: str = "") -> None:
        print(text, file=self.stream, flush=True)

    def documents(self, source: Source, *, text_field: str | None = None) -> Iterator[Document]:
        """Yield the documents of a source, then print what was skipped; `result` has it too."""
        report = ReadingReport()
        try:
            yield from read_documents(source, text_field=text_field, report=report)
        finally:
            self.facts(report.facts())
            self._reading[str(source)] = report.as_dict()

    def facts(self, facts: Mapping[str, str]) -> None:
        """Print what a reading reports: labels, and values of one or more lines."""
        for label, value in facts.items():
            self.log(f"{label:<9} " + value.replace("\n", "\n" + " " * 10))

    def result(self, content: Mapping[str, Any]) -> None:
        """Print the result as JSON; nothing without --json."""
        if self.json:
            content = {**content, **({"reading": self._reading} if self._reading else {})}
            # A terminal without UTF-8 gets escapes, which are valid JSON too.
            is_utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
            print(json.dumps(nan_to_null(content), ensure_ascii=not is_utf8), flush=True)

    def fail(self, message: str, exit_code: int) -> None:
        """Print an error, as far as there are streams: one may be closed, or on a full disk."""
        with suppress(OSError):
            print(f"pretrain: {message}", file=sys.stderr, flush=True)
        with suppress(OSError):
            self.result({"error": message, "exit_code": exit_code})


def require_writable(name: str) -> None:
    """ValueError if a command cannot write the file `name`, before it begins its work."""
    folder = os.path.dirname(os.path.realpath(name))
    if os.path.isdir(name) or not (_is_device(name) or os.access(folder, os.W_OK)):
        raise ValueError(f"{name} cannot be written; it must be a file in a folder of yours")


def write_output(name: str, text: str) -> None:
    """Write the file `name`, as a whole or not at all; an older one is replaced."""
    if _is_device(name):
        with open(name, "a", encoding="utf-8") as file:  # stdout may be a file with our own text
            file.write(text)
    else:
        replace_file(Path(os.path.realpath(name)), text.encode())


def _is_device(name: str) -> bool:
    """Whether this is a pipe or a device, such as /dev/stdout, which no file must replace."""
    return os.path.exists(name) and (
        not os.path.isfile(name) or name.startswith(("/dev/", "/proc/"))
    )
