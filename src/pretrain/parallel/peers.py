"""The error of a run of several processes of which one has failed. No torch."""

from __future__ import annotations


class PeerDied(Exception):
    """A process of the run failed, and so the run."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code
