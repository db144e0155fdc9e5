"""The error of a run of several processes of which one has failed. No torch."""

from __future__ import annotations

# What those say that have waited in vain, before the numbers of those who did not answer.
NO_ANSWER = "there is no answer from process"


class PeerDied(Exception):
    """A process of the run failed, and so the run."""

    def __init__(self, text: str, exit_code: int, *, signal: int | None = None) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.signal = signal
        """what killed the process, if a signal did"""
