"""Signals: the first asks the loop to stop after the running step, the second stops at once.

Where nothing would be lost (`nothing_to_lose`: before the first new step, while a compiler may work
for minutes, and after the last one is saved) the first one stops at once too.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from pretrain.distributed import World


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
        # Not `received`: where others had it first, this process's own is not its second.
        self._agreed: int | None = None
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

    def ends_run(self, world: World) -> bool:
        """Whether a signal came; of several processes to any, so that all stop at one step."""
        found = [int(n) for (n,) in world.all_gather([self.received or 0]) if n]
        self._agreed = found[0] if found else None
        return self._agreed is not None

    def breaks_off(self, world: World) -> bool:
        """Whether to leave an evaluation undone. Several processes end it: each waits for the
        others."""
        return self.received is not None and world.size == 1

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells have it: 130 for Ctrl-C, 143 for a plain kill."""
        number = self._agreed or self.received
        return 0 if number is None else 128 + number
