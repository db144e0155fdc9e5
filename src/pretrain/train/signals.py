"""Signals: the first asks the loop to stop after the running step, the second stops at once.

Where nothing would be lost (`nothing_to_lose`: before the first new step, while a compiler may work
for minutes, and after the last one is saved) the first one stops at once too.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, NamedTuple


class Ends(NamedTuple):
    """Where a run ends before its last step, if anywhere, as proofs of a resume need it."""

    stop_after: int | None = None
    """it is saved and left after so many steps, as if it had been signalled"""
    die_after: int | None = None
    """it kills itself"""


TO_THE_END = Ends()


class Stopped(KeyboardInterrupt):
    """A signal that is not to be waited for; `exit_code` is 128 plus its number, as shells have
    it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopSignals:
    """A context in which SIGINT, SIGTERM and (where there is one) SIGUSR1 are noted in
    `received`."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.nothing_to_lose = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, action in self._before.items():
            signal.signal(number, action)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, number
        if self.nothing_to_lose or not first:
            raise Stopped(number)

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells have it: 130 for Ctrl-C, 143 for a plain kill."""
        return 0 if self.received is None else 128 + self.received
