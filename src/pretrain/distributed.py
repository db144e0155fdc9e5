"""The processes of a run, and the device of this one.

A single process is a `World` of size 1 with the same interface. Several processes, started by
torchrun or by `pretrain train --parallel.processes`, exchange sums and texts (bytes, never pickled
objects). torch's threads and flags are set here.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from pretrain import machine
from pretrain.compat import cpu_capabilities, default_store, end_idle_threads
from pretrain.machine import RENDEZVOUS_FILE, n_local_processes, n_processes

# Rank 0 may prepare text for as long as it takes.
MAX_WAIT_DAYS = 7
# Time for all ranks to notice a timeout and to report that they are alive.
ROLL_CALL_SECONDS = 20


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run, and its device."""

    rank: int
    size: int
    device: torch.device
    threads: int
    cpu_group: ProcessGroup | None = None
    """gloo group for texts and numbers, if there are several processes"""
    save_group: ProcessGroup | None = None
    """another one for the thread that saves: threads must not share a group"""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and reports to the user."""
        return self.rank == 0

    def single_process(self) -> World:
        """A world of this process alone, on the same device."""
        return World(0, 1, self.device, self.threads)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place; the bits are the same on all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of each process, as float64, by rank; all must give equally many."""
        own = torch.tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return [own.tolist()]
        gathered = own.new_empty(self.size, len(numbers))
        dist.all_gather(list(gathered.unbind()), own, group=self.cpu_group)
        return gathered.tolist()

    def fsum(self, numbers: Iterable[float]) -> float:
        """The correctly rounded sum of all numbers of all processes, however they are spread."""
        own = json.dumps([float(number) for number in numbers])  # exact, NaN and infinities too
        return math.fsum(chain(*map(json.loads, self.all_gather_str(own))))

    def all_sum(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes, in the order of ranks."""
        return [sum(column) for column in zip(*self.all_gather(numbers), strict=True)]

    def all_gather_str(self, text: str, *, group: ProcessGroup | None = None) -> list[str]:
        """The text of each process, by rank; `group` is the CPU group by default."""
        if self.size == 1:
            return [text]
        group = group or self.cpu_group
        own = _to_tensor(text)
        lengths = torch.zeros(self.size, 1, dtype=torch.int64)
        dist.all_gather(list(lengths.unbind()), torch.tensor([len(own)]), group=group)
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(own)] = own
        rows = padded.new_empty(self.size, len(padded))
        dist.all_gather(list(rows.unbind()), padded, group=group)
        return [_to_text(row[: int(n)]) for row, n in zip(rows, lengths, strict=True)]

    def broadcast_str(self, text: str) -> str:
        """The text of rank 0."""
        if self.size == 1:
            return text
        own = _to_tensor(text)
        length = torch.tensor([len(own)])
        dist.broadcast(length, 0, group=self.cpu_group)
        received = own if self.is_main else own.new_empty(int(length))
        dist.broadcast(received, 0, group=self.cpu_group)
        return _to_text(received)

    def wait_for_main(self) -> None:
        """Wait until rank 0 gets here too, however long it works."""
        if self.size == 1:
            return
        # A key-value store has no timeout of its own, as collectives have.
        store = default_store()
        key = f"pretrain/main/{store.add(f'pretrain/waits/{self.rank}', 1)}"
        if self.is_main:
            store.set(key, "here")
        else:
            store.wait([key], timedelta(days=MAX_WAIT_DAYS))

    def unresponsive_ranks(self) -> str:
        """The ranks that do not answer, as "1, 3"; all others must call this, and get the same."""
        absent: list[int] | None = None

        def call_roll() -> None:
            nonlocal absent
            with suppress(RuntimeError):
                store = default_store()
                store.set_timeout(timedelta(seconds=ROLL_CALL_SECONDS))
                store.set(f"pretrain/here/{self.rank}", "here")
                waiting = list(range(self.size))
                end = time.monotonic() + ROLL_CALL_SECONDS
                while waiting and time.monotonic() < end:
                    waiting = [r for r in waiting if not store.check([f"pretrain/here/{r}"])]
                    time.sleep(0.1)
                absent = waiting

        # torchrun's store is in rank 0's process. Without a connection to it a call never returns.
        thread = threading.Thread(target=call_roll, daemon=True)
        thread.start()
        thread.join(2 * ROLL_CALL_SECONDS)
        if absent is None:
            return "" if self.is_main else "0"
        return ", ".join(map(str, absent))

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards includes its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Compute matmuls in bfloat16 for the precision bf16; everything in float32 for fp32."""
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def has_native_bf16(self) -> bool:
        """Whether the device multiplies in bfloat16; emulation is up to a hundred times slower."""
        if self.device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported())
        features = cpu_capabilities() if self.device.type == "cpu" else {}
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))

    def peak_memory_bytes(self) -> int:
        """Peak memory: allocated on the GPU, or else resident memory of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts in KiB, macOS in bytes.
        return peak if sys.platform == "darwin" else peak * 1024

    def leave(self) -> None:
        """Destroy the process groups, when all common work is done."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _to_tensor(text: str) -> Tensor:
    """Return UTF-8 bytes with a zero at the end: torch cannot view an empty buffer."""
    return torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)


def _to_text(received: Tensor) -> str:
    return received[:-1].numpy().tobytes().decode()


def open_world(
    device: str = "auto",
    *,
    threads: int | None = None,
    deterministic: bool = False,
    timeout_seconds: float = 600.0,
    alone: bool = False,
) -> World:
    """Choose the device, set torch's threads and flags, and join the other processes that a
    launcher has started, unless `alone`. Collectives time out after `timeout_seconds`.

    Raises ValueError if the device is not available, or another process is not found.
    """
    size = 1 if alone else n_processes()
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [*(name for name, is_available in gpus.items() if is_available), "cpu"]
    if device == "auto":
        device = available[0]
    if device not in available:
        names = ", ".join(available)
        raise ValueError(f"train.device {device} is not available here; it must be one of: {names}")
    if deterministic and device == "cuda":
        # cuBLAS is deterministic only with a workspace of fixed size, and reads this before its
        # first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    threads = threads or machine.default_threads(n_local_processes() if size > 1 else 1)
    torch.set_num_threads(threads)
    # Numbers below 1e-38 take a slow path in the CPU. They are 0 in all threads, also where torch
    # was used before.
    torch.set_flush_denormal(True)
    end_idle_threads()

    own_device = torch.device(device)
    if size == 1:
        return World(rank=0, size=1, device=own_device, threads=threads)
    rank = machine.rank_of_process()
    if device == "cuda":
        local_rank, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise ValueError(
                f"each process needs its own GPU: this machine has {n_local_processes()} processes "
                f"and {n_gpus} GPUs; set parallel.processes to at most {n_gpus}, or train.device "
                "to cpu"
            )
        own_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(own_device)
    timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        path = os.environ.get(RENDEZVOUS_FILE)
        try:
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                init_method=f"file://{path}" if path else "env://",  # env: where torchrun says
                rank=rank,
                world_size=size,
                timeout=timeout,
                device_id=own_device if device == "cuda" else None,
            )
        except (dist.DistError, ValueError) as error:
            raise ValueError(
                f"rank {rank} did not find the other processes of WORLD_SIZE {size}: {error}"
            ) from None
    cpu_group, save_group = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return World(rank, size, own_device, threads, cpu_group, save_group)


def describe_machine() -> dict[str, Any]:
    """What numbers depend on besides the config: versions, platform, processor."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability() + f", {machine.usable_cores()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
