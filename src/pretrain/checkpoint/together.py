"""Work on shared files by several processes, of which one that fails fails for all.

Each call is made by every process. An OSError is told to the others, so that all of them raise it
and none waits for one that has given up.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from pretrain.distributed import World


class Processes:
    """Those that save together, as one of them sees them; without a world it is alone."""

    def __init__(self, world: World | None) -> None:
        self._world = world
        self.rank, self.size = (0, 1) if world is None else (world.rank, world.size)

    def gather(self, text: str) -> list[str]:
        """The text of each, by rank."""
        if self._world is None or self.size == 1:
            return [text]
        return self._world.all_gather_str(text, group=self._world.save_group)

    def each(self, work: Callable[[], str | None]) -> list[str]:
        """Let each process work; returns what all came to. OSError if it fails for one."""
        if self.size == 1:
            return [work() or ""]
        error: OSError | None = None
        try:
            answer = json.dumps({"text": work() or ""})
        except OSError as failed:
            error = failed
            answer = json.dumps({"errno": failed.errno, "why": str(failed)})
        answers = [json.loads(text) for text in self.gather(answer)]
        if error is not None:
            raise error
        for rank, other in enumerate(answers):
            if "why" in other:
                raise OSError(other["errno"], f"process {rank}: {other['why']}")
        return [other["text"] for other in answers]

    def first(self, work: Callable[[], str | None]) -> str:
        """Let the first process work; returns what it came to, to everybody."""
        return self.each(work if self.rank == 0 else str)[0]
