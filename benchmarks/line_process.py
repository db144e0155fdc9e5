"""A Python process that answers each line it is sent with one line of JSON.

So several can take turns, of which only one works at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from typing import Any


class LineProcess:
    """Runs `python WORDS`; `ask` sends a line and returns the answer."""

    def __init__(self, words: list[str], environment: dict[str, str] | None = None) -> None:
        self._words = words
        self._process = subprocess.Popen(
            [sys.executable, *words],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, line: str = "") -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # one that has ended has no answer either
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"no answer from python {' '.join(self._words)}; run it to see why")
        return json.loads(answer)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
