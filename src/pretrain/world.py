"""The processes of a run and the device of this one.

One process is the same API with size 1, so nobody asks which it is. Threads are set deliberately
here, and the environment is read here and in the command line only.
"""

from __future__ import annotations

import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
# How often a thread of GNU's OpenMP looks whether there is more to do before it sleeps: some 70
# microseconds. Its own 300,000 keep a core from whoever has work, this program's other threads too.
SPINS = 3000


@dataclass(frozen=True, slots=True)
class World:
    """Who am I among the processes of this run, and where do my tensors live."""

    rank: int
    size: int
    device: torch.device
    threads: int

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

    def has_bf16_units(self) -> bool:
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
    device: str = "auto", *, threads: int | None = None, deterministic: bool = False
) -> World:
    """Choose the device and set torch's threads; raises ValueError for a device that is not
    there."""
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
    threads = threads or usable_cores()
    torch.set_num_threads(threads)
    # Numbers below 1e-38 take a slow path in the CPU, and no result of ours hangs on them.
    torch.set_flush_denormal(True)
    return World(rank=0, size=1, device=torch.device(device), threads=threads)


def yield_idle_cores() -> None:
    """Let threads that wait for others sleep soon, unless the user says how they wait; read when
    torch is loaded, so it must be called before (docs/speed.md has what it gains)."""
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
