"""A process that has imported torch once forks a child for each case and kills it.

A child says how far it is by writing a number into memory that both share; what stands there after
its death is where it died, to the instruction. The forking process must have no other threads.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from faults.table import Unrecovered


class Phase:
    """A number that a child sets and its parent sees, also after the child's death."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def set(self, value: int) -> None:
        self._memory[:8] = value.to_bytes(8, "little")

    def get(self) -> int:
        return int.from_bytes(self._memory[:8], "little")


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child; its exit status is 0, the int that `work` returned, or 1 for an
    exception. Returns its process id."""
    gc.freeze()  # a collection in the child would copy every page
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        result = work()
        code = result if isinstance(result, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a child; its exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(child: int) -> bool:
    """SIGKILL a child; whether that is what it died of."""
    os.kill(child, signal.SIGKILL)
    return exit_code(child) == -signal.SIGKILL


def wait_for(phase: Phase, value: int, *, most_seconds: float = 60) -> None:
    """Return once a child has reached a phase."""
    deadline = time.monotonic() + most_seconds
    while phase.get() < value:
        if time.monotonic() > deadline:
            raise TimeoutError(f"a child did not reach phase {value} in {most_seconds} s")
        time.sleep(0.0001)


def side_by_side(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run each of `works` in a child of its own, all at once; their results, which must be JSON.
    What one finds unrecovered is raised here."""
    readers, children = [], []
    for work in works:
        reader, writer = os.pipe()

        def report(work: Callable[[], Any] = work, writer: int = writer) -> None:
            try:
                result = {"result": work()}
            except Unrecovered as error:
                result = {"unrecovered": str(error)}
            with open(writer, "w") as file:
                json.dump(result, file)

        children.append(fork(report))
        os.close(writer)
        readers.append(reader)
    results = []
    for reader, child in zip(readers, children, strict=True):
        with open(reader) as file:
            text = file.read()
        code = exit_code(child)
        if not text:
            raise Unrecovered(f"a part of the suite itself died (exit code {code})")
        results.append(json.loads(text))
    for each in results:
        if "unrecovered" in each:
            raise Unrecovered(each["unrecovered"])
    return [each["result"] for each in results]
