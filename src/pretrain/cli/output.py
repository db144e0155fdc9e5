"""What a command prints: text for humans on one stream, one JSON object on the other."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from pretrain.fileio import nan_to_null


class Output:
    """With `json`, standard output gets exactly one JSON object and standard error all text."""

    def __init__(self, *, json: bool) -> None:
        self.json = json

    @property
    def stream(self) -> TextIO:
        """Where text for humans goes."""
        return sys.stderr if self.json else sys.stdout

    def log(self, text: str = "") -> None:
        print(text, file=self.stream, flush=True)

    def result(self, content: Mapping[str, Any]) -> None:
        """Print the result as JSON; nothing without --json."""
        if self.json:
            # A terminal without UTF-8 gets escapes, which are valid JSON too.
            is_utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
            print(json.dumps(nan_to_null(content), ensure_ascii=not is_utf8), flush=True)

    def fail(self, message: str, exit_code: int) -> None:
        print(f"pretrain: {message}", file=sys.stderr, flush=True)
        self.result({"error": message, "exit_code": exit_code})
