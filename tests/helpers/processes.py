"""A pool of processes that meet as torchrun's would, and are kept from test to test: to start one
takes as long as most tests.

A job is a function of a module and its arguments; each process runs it in a world of its own size
and rank, and its answers come back by rank.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WAIT_SECONDS = 120


class Pool:
    """Processes that wait for jobs."""

    def __init__(self) -> None:
        self._members: list[tuple[Any, Connection]] = []

    def run(self, n: int, job: Callable[..., Any], *given: Any, **named: Any) -> list[Any]:
        """What `job(*given, **named)` returns in each of `n` processes; AssertionError with the
        trace of one that fails."""
        context = multiprocessing.get_context("spawn")
        while len(self._members) < n:
            here, there = context.Pipe()
            member = context.Process(target=_serve, args=(there,), daemon=True)
            member.start()
            self._members.append((member, here))
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(n):
                name = (job.__module__, job.__qualname__)
                self._members[rank][1].send((rank, n, f"{folder}/meeting", name, given, named))
            answers = []
            for rank in range(n):
                pipe = self._members[rank][1]
                assert pipe.poll(WAIT_SECONDS), f"process {rank} of {n} does not answer"
                answers.append(pipe.recv())
        for rank, (is_good, answer) in enumerate(answers):
            if not is_good:
                self.close()
                raise AssertionError(f"process {rank} of {n}:\n{answer}")
        return [answer for _, answer in answers]

    def close(self) -> None:
        for member, _ in self._members:
            member.kill()
            member.join()
        self._members = []


def _serve(pipe: Connection) -> None:
    while True:
        rank, size, meeting, (module, name), given, named = pipe.recv()
        with surroundings(rank, size, Path(meeting)):
            try:
                job = getattr(importlib.import_module(module), name)
                pipe.send((True, job(*given, **named)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
            finally:
                _leave()


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def surroundings(rank: int, size: int, meeting: Path) -> Iterator[None]:
    """The environment in which a launcher starts one of several processes."""
    words = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "PRETRAIN_RENDEZVOUS_FILE": str(meeting),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    os.environ.update(words)
    yield
    for word in words:
        os.environ.pop(word, None)
