"""Signals: the first one asks the loop to stop after the running step, the second stops at once.

Ctrl-C, `kill`, a terminal that closes (unless nohup has SIGHUP ignored), a batch system before it
takes the machine (SIGUSR1, SIGUSR2) and a limit on CPU time (SIGXCPU) are answered alike.

The first one stops at once too while there is nothing to save: before the first new step, in which
a compiler may work for minutes, and after the last checkpoint.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.distributed import World


STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
# These come again by themselves: from the shell after the terminal, each second after the limit.
REPEATED = ("SIGHUP", "SIGXCPU")


def stop_signals() -> list[signal.Signals]:
    """Return the STOP_SIGNALS that this system has, without SIGHUP where nohup has it ignored; none
    outside of the main thread, which alone may handle them."""
    if threading.current_thread() is not threading.main_thread():
        return []
    known = [signal.Signals[name] for name in STOP_SIGNALS if hasattr(signal, name)]
    return [n for n in known if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


class Stopped(KeyboardInterrupt):
    """A signal that stops at once; `exit_code` is 128 plus its number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopSignals:
    """A context in which STOP_SIGNALS are noted in `received`."""

    def __init__(self, *, immediate: bool = False) -> None:
        self.received: int | None = None
        self.immediate = immediate
        """whether even the first signal stops at once, because there is nothing to save"""
        # Separate from `received`: a signal that other processes got first is not this one's.
        self._agreed: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_first = self.received is None
        self.received = self.received or number
        if self.immediate or not (is_first or signal.Signals(number).name in REPEATED):
            raise Stopped(number)

    def requested(self, world: World) -> bool:
        """Whether a signal came to any process, so that all stop after the same step."""
        numbers = [int(number) for (number,) in world.all_gather([self.received or 0]) if number]
        self._agreed = numbers[0] if numbers else None
        return self._agreed is not None

    def interrupts_evaluation(self, world: World) -> bool:
        """Whether to break off an evaluation; several processes finish it, since each waits for
        the others."""
        return self.received is not None and world.size == 1

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as in a shell: 130 for Ctrl-C, 143 for a plain kill."""
        number = self._agreed or self.received
        return 0 if number is None else 128 + number
