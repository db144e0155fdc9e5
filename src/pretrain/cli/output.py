"""What a verb says: text for people on one stream, one JSON object on the other."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


class Output:
    """With `json`, standard output holds exactly one JSON object and people read standard error."""

    def __init__(self, *, json: bool) -> None:
        self.json = json

    @property
    def people(self) -> TextIO:
        return sys.stderr if self.json else sys.stdout

    def say(self, text: str = "") -> None:
        print(text, file=self.people, flush=True)

    def stages(self) -> Callable[[str, float], None]:
        """Return a progress callback (stage, fraction) that reports long work here."""
        from pretrain.runner.text import stage_progress

        return stage_progress(self.say)

    def result(self, content: Mapping[str, Any]) -> None:
        """The machine-readable answer; without --json it is not printed."""
        if self.json:
            escaped = not (sys.stdout.encoding or "").lower().startswith("utf")
            print(json.dumps(plain(content), ensure_ascii=escaped), flush=True)

    def fail(self, reason: str, code: int) -> None:
        print(f"pretrain: {reason}", file=sys.stderr, flush=True)
        self.result({"error": reason, "exit_code": code})
