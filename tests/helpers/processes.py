"""A pool of processes with the environment of torchrun, reused from test to test: to start a
process takes as long as most tests.

A job is a function of a module and its arguments. Each process runs it with its own rank, and the
results come back by rank.
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

    def run(self, n: int, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Return the results of `job(*args, **kwargs)` in `n` processes, by rank; AssertionError
        with the traceback if one fails."""
        context = multiprocessing.get_context("spawn")
        while len(self._members) < n:
            here, there = context.Pipe()
            member = context.Process(target=_serve, args=(there,), daemon=True)
            member.start()
            self._members.append((member, here))
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(n):
                name = (job.__module__, job.__qualname__)
                self._members[rank][1].send((rank, n, f"{folder}/rendezvous", name, args, kwargs))
            answers = []
            for rank in range(n):
                pipe = self._members[rank][1]
                assert pipe.poll(WAIT_SECONDS), f"rank {rank} of {n}: no answer in {WAIT_SECONDS} s"
                answers.append(pipe.recv())
        for rank, (has_result, answer) in enumerate(answers):
            if not has_result:
                self.close()
                raise AssertionError(f"rank {rank} of {n}:\n{answer}")
        return [answer for _, answer in answers]

    def close(self) -> None:
        for member, _ in self._members:
            member.kill()
            member.join()
        self._members = []


def _serve(pipe: Connection) -> None:
    while True:
        rank, size, rendezvous, (module, name), args, kwargs = pipe.recv()
        with environment(rank, size, Path(rendezvous)):
            try:
                job = getattr(importlib.import_module(module), name)
                pipe.send((True, job(*args, **kwargs)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
            finally:
                _destroy_groups()


def _destroy_groups() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def environment(rank: int, size: int, rendezvous: Path) -> Iterator[None]:
    """Set the environment variables of one of several processes, as a launcher does."""
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "PRETRAIN_RENDEZVOUS_FILE": str(rendezvous),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    os.environ.update(variables)
    yield
    for name in variables:
        os.environ.pop(name, None)
