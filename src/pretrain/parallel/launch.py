"""Processes of one machine, started and watched by torch's elastic agent, which is torchrun's own.

A command comes in; an exit code goes out, or PeerDied, with the last words of the process that
failed. They meet where the environment says.
"""

from __future__ import annotations

import logging
import secrets
import signal
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pretrain.parallel.peers import NO_ANSWER, PeerDied

# What one signal asks for is a checkpoint, after the step, the evaluation and the save at hand; a
# process that is stopped never answers. A second signal does not wait.
PATIENCE_SECONDS = 600
# Settings that releases before torch 2.13 do not all have.
_SINCE: dict[str, Any] = {
    "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGUSR1",
    "shutdown_timeout": PATIENCE_SECONDS,
}
_LAST_LINES = 20


def run_processes(command: Sequence[str], n: int, folder: Path) -> int:
    """Run `command` in `n` processes to its end, with logs in `folder`; only the first one's words
    are seen. A signal is passed on to all, and 128 plus its number is the exit code."""
    # What the agent has to say is said here, in words of the run.
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    known = {field.name for field in fields(LaunchConfig)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=secrets.token_hex(4),
        rdzv_backend="c10d",
        rdzv_endpoint=f"{folder}/agents",
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(
            log_dir=str(folder), redirects=dict.fromkeys(range(1, n), Std.ALL)
        ),
        **{name: value for name, value in _SINCE.items() if name in known},
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        first, _ = error.get_first_failure()

        def after(rank: int) -> tuple[bool, ...]:
            # One that does not answer is killed by the agent, after the others have said so; what a
            # killed one leaves behind fails a moment later, and may be seen at once; those that the
            # agent ended then did nothing wrong.
            code, says_it = codes[rank], NO_ANSWER in _word(rank, folder)
            return not says_it, code == -signal.SIGTERM, code >= 0, rank != first

        rank = min(codes, key=after)
        raise _died(rank, codes[rank], folder) from None
    return 0


def _word(rank: int, folder: Path) -> str:
    """What a process has left word of, before it failed."""
    left = folder / f"meeting.{rank}"
    return left.read_text(encoding="utf-8") if left.is_file() else ""


def _died(rank: int, code: int, folder: Path) -> PeerDied:
    """The error of the first process that failed, with the word that it has left, or its last
    ones."""
    if code < 0:
        text = f"process {rank} was killed by {signal.Signals(-code).name}"
        return PeerDied(text, 1, signal=-code)
    if reason := _word(rank, folder):
        # What the user can put right is no matter of who has found it.
        is_said = code == 2 or reason.startswith("process ")
        return PeerDied(reason if is_said else f"process {rank}: {reason}", code)
    said = [line for path in folder.glob(f"*/*/{rank}/stderr.log") for line in path.open()]
    words = "".join(["\n", *said[-_LAST_LINES:]]).rstrip()
    return PeerDied(f"process {rank} ended with exit code {code}{words}", code)
