"""Several processes of one run: started on this machine, or joined where torchrun started them.

`launch` starts them with torch's elastic agent (the one of torchrun), which ends all when one
fails. Across machines torchrun does that, and only `join_processes` is called. Only rank 0 writes
files and messages; a failing rank leaves its error message in a file for the launcher to report.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pretrain.config import RunConfig
from pretrain.machine import RENDEZVOUS_FILE, memory_bytes
from pretrain.train.signals import REPEATED, STOP_SIGNALS, stop_signals

if TYPE_CHECKING:
    from pretrain.distributed import World

# Memory of a process before it has a model.
BYTES_PER_PROCESS = 300_000_000
# A signal is passed on to all ranks, and each finishes its step, evaluation and checkpoint first. A
# rank that is suspended never answers. A second signal does not wait.
SHUTDOWN_SECONDS = 600
# Settings of torch's launcher that releases before torch 2.13 partly lack.
NEW_LAUNCH_SETTINGS: dict[str, Any] = {
    "signals_to_handle": ",".join(name for name in STOP_SIGNALS if name not in REPEATED),
    "shutdown_timeout": SHUTDOWN_SECONDS,
}
_N_LAST_LINES = 20
_NO_ANSWER = "no answer from ranks"
# How gloo and NCCL report that another process is gone.
_CONNECTION_LOST = re.compile(r"gloo|NCCL|[Cc]onnection|[Tt]imed out")


class ProcessFailed(Exception):
    """A process of the run failed, and so the run."""

    def __init__(self, message: str, exit_code: int, *, signal: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.signal = signal
        """the signal that killed the process, if any"""


def launch(args: Sequence[str], n: int, *, program: Sequence[str] = ("-m", "pretrain")) -> int:
    """Run `python PROGRAM ARGS` in `n` processes of this machine; only rank 0 prints. A signal is
    passed on to all, and 128 plus its number is returned. ProcessFailed when one fails."""
    n_bytes = memory_bytes()
    if n_bytes is not None and n * BYTES_PER_PROCESS > n_bytes:
        raise ValueError(
            f"parallel.processes must be at most {n_bytes // BYTES_PER_PROCESS} on this machine "
            f"(got {n:,}): it has {n_bytes / 1e9:,.0f} GB of memory"
        )
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent's own messages would only repeat ours.
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    known = {field.name for field in fields(LaunchConfig)}
    new_settings = {name: v for name, v in NEW_LAUNCH_SETTINGS.items() if name in known}
    with tempfile.TemporaryDirectory(prefix="pretrain-") as folder, _environment(folder):
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
                log_dir=folder, redirects=dict.fromkeys(range(1, n), Std.ALL)
            ),
            **new_settings,
        )

        def pass_on_once(number: int, frame: FrameType | None) -> None:
            signal.signal(number, signal.SIG_IGN)
            raise SignalException(f"stopped by signal {number}", signal.Signals(number))

        previous = {number: signal.getsignal(number) for number in stop_signals()}
        try:
            for number in previous:
                if number.name in REPEATED:
                    signal.signal(number, pass_on_once)
            elastic_launch(config, sys.executable)(*program, *args)
        except SignalException as stopped:
            return 128 + stopped.sigval
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            raise _failure_of(exit_codes, error.get_first_failure()[0], Path(folder)) from None
        finally:  # the agent leaves handlers of its own
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)
    return 0


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """Set the variables of processes that are started; what this one starts later has its own."""
    # No socket of this run is open to the network: agent and processes meet through files.
    own = {RENDEZVOUS_FILE: f"{folder}/meeting", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if sys.platform == "linux":
        own["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    before = {**os.environ}
    os.environ.update(own)
    try:
        yield
    finally:  # torch's launcher sets some too
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _failure_of(exit_codes: Mapping[int, int], first_rank: int, folder: Path) -> ProcessFailed:
    """Return the error of the rank that failed by itself: its signal, the message that it left, or
    its last lines; `first_rank` was seen to fail first."""

    def report_order(rank: int) -> tuple[bool, ...]:
        # First a rank that names another one which does not answer (the agent kills that one
        # afterwards), then a rank that a signal has killed (those that lost it fail a moment later,
        # and may be seen first); last those that the agent itself ended with SIGTERM.
        code = exit_codes[rank]
        names_other = _NO_ANSWER in _message_of(rank, folder)
        return not names_other, code == -signal.SIGTERM, code >= 0, rank != first_rank

    rank = min(exit_codes, key=report_order)
    exit_code = exit_codes[rank]
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return ProcessFailed(f"rank {rank} was killed by {name}", 1, signal=-exit_code)
    if message := _message_of(rank, folder):
        # An error that the user can correct does not depend on the rank.
        names_rank = exit_code == 2 or message.startswith("rank ")
        return ProcessFailed(message if names_rank else f"rank {rank}: {message}", exit_code)
    lines = [line for path in folder.glob(f"*/*/{rank}/stderr.log") for line in path.open()]
    last_lines = "".join(["\n", *lines[-_N_LAST_LINES:]]).rstrip()
    return ProcessFailed(f"rank {rank} ended with exit code {exit_code}{last_lines}", exit_code)


def report_to_launcher(message: str) -> bool:
    """Leave this rank's error message for the process that started it; returns whether there is
    one."""
    rendezvous, rank = os.environ.get(RENDEZVOUS_FILE), os.environ.get("RANK")
    if rendezvous is None or rank is None:
        return False
    Path(f"{rendezvous}.{rank}").write_text(message, encoding="utf-8")
    return True


def _message_of(rank: int, folder: Path) -> str:
    """Return the message that a rank left with `report_to_launcher`, or ""."""
    path = folder / f"meeting.{rank}"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


# --- in each process ---------------------------------------------------------------------------


def open_world_of(config: RunConfig, *, alone: bool = False) -> World:
    """Open the world (device, threads, other ranks) that a run's settings name."""
    from pretrain.distributed import open_world

    train = config.train
    return open_world(
        train.device,
        threads=train.threads,
        deterministic=train.deterministic,
        timeout_seconds=config.parallel.timeout_seconds,
        alone=alone,
    )


@contextmanager
def naming_lost_ranks(world: World, timeout_seconds: float) -> Iterator[None]:
    """Turn torch's error about a rank that is gone or does not answer into a ProcessFailed that
    names it."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not _CONNECTION_LOST.search(str(error)):
            raise
        message = f"rank {world.rank} ({platform.node()}): lost the connection to another rank"
        if "imed out" in str(error) and (missing := world.unresponsive_ranks()):
            message = (
                f"rank {world.rank} ({platform.node()}): timed out after {timeout_seconds:g} "
                f"seconds; {_NO_ANSWER} {missing}"
            )
        raise ProcessFailed(message, 1) from None


def check_same_on_all_ranks(world: World, facts: Mapping[str, Any]) -> None:
    """All ranks have the same text, settings, code and versions. ValueError with the
    differences."""
    own = json.dumps(dict(facts), default=str)
    first, *others = [json.loads(text) for text in world.all_gather_str(own)]
    for rank, other in enumerate(others, start=1):
        names = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
        if names:
            shown = "; ".join(f"{name}: {first.get(name)} and {other.get(name)}" for name in names)
            raise ValueError(f"rank 0 and rank {rank} must not differ: {shown}")


def die_with_parent() -> None:
    """Be killed together with the elastic agent: nobody else would end a process that waits for
    others."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    import ctypes

    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
