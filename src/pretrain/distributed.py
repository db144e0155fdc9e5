"""The processes of a run and the device of this one.

One process is the same API with size 1, so nobody asks which it is. Where torchrun, or `pretrain
train --parallel.processes`, has started several, they meet here, and say to each other what
everybody must know: sums, and texts as bytes, never pickled objects. Threads are set deliberately
here, and the environment is read here and in the command line only.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

# How often a thread of GNU's OpenMP looks whether there is more to do before it sleeps: some 70
# microseconds. Its own 300,000 keep a core from whoever has work, this program's other threads too.
SPINS = 3000
# Where processes of one machine meet: a file, since a socket would be open to the whole network.
RENDEZVOUS_FILE = "PRETRAIN_RENDEZVOUS_FILE"
# The first process may prepare text for as long as it takes.
PATIENCE_DAYS = 7
# Those that wait in vain say so at about the same time, and then look who is there.
ROLL_CALL_SECONDS = 20


@dataclass(frozen=True, slots=True)
class World:
    """Who am I among the processes of this run, and where do my tensors live."""

    rank: int
    size: int
    device: torch.device
    threads: int
    cpu_group: ProcessGroup | None = None
    """what the processes talk through beside the model's own traffic, where there are several"""
    save_group: ProcessGroup | None = None
    """the same for a thread that saves, which must not share a group with the loop"""

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and talks to people."""
        return self.rank == 0

    def single_process(self) -> World:
        """The same process by itself, for what it does without the others."""
        return World(0, 1, self.device, self.threads)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place: the same bits for each of them."""
        import torch.distributed as dist

        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of each process, as float64, by rank; each gives as many."""
        import torch
        import torch.distributed as dist

        mine = torch.tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return [mine.tolist()]
        all_of_them = mine.new_empty(self.size, len(numbers))
        dist.all_gather(list(all_of_them.unbind()), mine, group=self.cpu_group)
        return all_of_them.tolist()

    def all_gather_uneven(self, numbers: Sequence[float]) -> list[float]:
        """The numbers of all processes in a row, of which each may give as many as it has."""
        most = int(max(n for (n,) in self.all_gather([len(numbers)])))
        rows = self.all_gather([len(numbers), *numbers, *[0.0] * (most - len(numbers))])
        return [number for n, *row in rows for number in row[: int(n)]]

    def all_sum(self, *numbers: float) -> list[float]:
        """Sums of numbers over all processes, in the order of ranks."""
        return [sum(column) for column in zip(*self.all_gather(numbers), strict=True)]

    def all_gather_str(self, text: str, *, group: ProcessGroup | None = None) -> list[str]:
        """The text of each process, by rank."""
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return [text]
        group = group or self.cpu_group
        mine = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        sizes = torch.zeros(self.size, 1, dtype=torch.int64)
        dist.all_gather(list(sizes.unbind()), torch.tensor([len(mine)]), group=group)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(mine)] = mine
        found = padded.new_empty(self.size, len(padded))
        dist.all_gather(list(found.unbind()), padded, group=group)
        return [
            row[: int(n) - 1].numpy().tobytes().decode()
            for row, n in zip(found, sizes, strict=True)
        ]

    def broadcast_str(self, text: str) -> str:
        """The first process's text."""
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return text
        mine = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        size = torch.tensor([len(mine)])
        dist.broadcast(size, 0, group=self.cpu_group)
        told = mine if self.is_main else mine.new_empty(int(size))
        dist.broadcast(told, 0, group=self.cpu_group)
        return told[:-1].numpy().tobytes().decode()

    def unresponsive_ranks(self) -> str:
        """Who does not answer, as numbers in a text: everybody leaves word where the processes met,
        and the same ones are missing for each."""
        absent: list[int] | None = None

        def call() -> None:
            nonlocal absent
            with suppress(RuntimeError):
                absent = self._absent()

        # Under torchrun the first process keeps the words; one that is cut off from it is never
        # told so.
        calling = threading.Thread(target=call, daemon=True)
        calling.start()
        calling.join(2 * ROLL_CALL_SECONDS)
        if absent is None:
            return "0" if self.rank else ""
        return ", ".join(map(str, absent))

    def _absent(self) -> list[int]:
        import torch.distributed as dist

        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=ROLL_CALL_SECONDS))
        store.set(f"pretrain/here/{self.rank}", "here")
        absent = list(range(self.size))
        end = time.monotonic() + ROLL_CALL_SECONDS
        while absent and time.monotonic() < end:
            absent = [rank for rank in absent if not store.check([f"pretrain/here/{rank}"])]
            time.sleep(0.1)
        return absent

    def wait_for_main(self) -> None:
        """Go on when the first process comes here too, however long it has to work."""
        import torch.distributed as dist

        if self.size == 1:
            return
        # Where the processes met they also leave word, for which there is no limit of time.
        store = dist.distributed_c10d._get_default_store()
        word = f"pretrain/leader/{store.add(f'pretrain/waits/{self.rank}', 1)}"
        if self.is_main:
            store.set(word, "here")
        else:
            store.wait([word], timedelta(days=PATIENCE_DAYS))

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards has seen the work."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Matrix products in bfloat16 for precision bf16, all in float32 for fp32."""
        import torch

        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def has_native_bf16(self) -> bool:
        """Whether this device multiplies in bfloat16 itself, and not by imitation, which is up to a
        hundred times slower."""
        import torch

        if self.device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported())
        if self.device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
            return False
        can = torch.cpu.get_capabilities()
        return bool(can.get("avx512_bf16") or can.get("amx_bf16"))

    def peak_memory_bytes(self) -> int:
        """The most memory held so far: the device's own count, or this process's resident set."""
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows has no such count in its standard library
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts in KiB, macOS in bytes.
        return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int | None:
    """Memory that this machine has; None where it cannot be asked."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # other systems have other names, or none
        return None


def usable_cores() -> int:
    """Cores that this process may run on, which a container may have made fewer than the
    machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_world(
    device: str = "auto",
    *,
    threads: int | None = None,
    deterministic: bool = False,
    timeout_seconds: float = 600.0,
) -> World:
    """Choose the device, set torch's threads, and meet the other processes, if there are any, of
    which each waits so long for the others; raises ValueError for a device that is not there."""
    import torch

    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name, there in found.items() if there)
    if not found.get(device, False):
        there = ", ".join(name for name, is_there in found.items() if is_there)
        raise ValueError(f"train.device {device} is not available here; there is: {there}")
    if deterministic and device == "cuda":
        # cuBLAS is only repeatable with a workspace of fixed size, and reads this before its first
        # call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    rank, size = int(os.environ.get("RANK", 0)), n_processes()
    threads = threads or max(1, usable_cores() // n_local_processes())
    torch.set_num_threads(threads)
    # Numbers below 1e-38 take a slow path in the CPU, and no result of ours hangs on them.
    torch.set_flush_denormal(True)
    if size == 1:
        return World(rank=0, size=1, device=torch.device(device), threads=threads)
    place = torch.device(device)
    if device == "cuda":
        here, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if here >= n_gpus:
            raise ValueError(
                f"each process needs a GPU of its own: {n_local_processes()} processes are on "
                f"this machine, GPUs: {n_gpus}. Give --parallel.processes {n_gpus} or fewer, or "
                "train.device cpu"
            )
        place = torch.device("cuda", here)
        torch.cuda.set_device(place)
    groups = _join(rank, size, place, timeout_seconds)
    return World(rank, size, place, threads, *groups)


def n_processes() -> int:
    """How many processes this one is said to be one of, by those who started it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def n_local_processes() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", n_processes()))


def n_restarts() -> int:
    """How often the processes of this run were started before, by those who started this one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _join(rank: int, size: int, device: torch.device, timeout_seconds: float) -> list[ProcessGroup]:
    """Meet the other processes: at a file if one is named, else where torchrun says."""
    import torch.distributed as dist

    if not dist.is_initialized():
        met = os.environ.get(RENDEZVOUS_FILE)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{met}" if met else "env://",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    limit = timedelta(seconds=timeout_seconds)
    return [dist.new_group(backend="gloo", timeout=limit) for _ in range(2)]


def leave_world(world: World) -> None:
    """Part from the other processes, when all work together is done."""
    import torch.distributed as dist

    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def yield_idle_cores() -> None:
    """Let threads that wait for others sleep soon, unless the user says how they wait; read when
    torch is loaded, so it must be called before (docs/explanation/speed.md has what it gains)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def describe_machine() -> dict[str, Any]:
    """What a number of this run depends on besides its config: versions, platform, processor."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability() + f", {usable_cores()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
