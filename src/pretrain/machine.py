"""This machine, and what a launcher says of the processes on it; without torch."""

from __future__ import annotations

import ctypes
import gc
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product
from math import ceil
from pathlib import Path

# How often an idle thread of GNU's OpenMP polls before it sleeps: about 70 microseconds. The
# default of 300,000 keeps a core from other threads, also from those of this program.
SPINS = 3000
_PROCESS = Path("/proc/self")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
# Names the file through which the processes of one machine find each other. A socket would be open
# to the network.
RENDEZVOUS_FILE = "PRETRAIN_RENDEZVOUS_FILE"


def n_processes() -> int:
    """Number of processes of the run, as set by the launcher."""
    return _launched("WORLD_SIZE", 1)


def n_local_processes() -> int:
    """Number of its processes on this machine."""
    return _launched("LOCAL_WORLD_SIZE", n_processes())


def n_restarts() -> int:
    """How often the launcher has restarted the processes of this run."""
    return _launched("TORCHELASTIC_RESTART_COUNT", 0)


def rank_of_process() -> int:
    """Rank of this process among several. ValueError for variables of a launcher that do not belong
    together, such as those that a shell has from the job in which it was opened."""
    rank, needed = _launched("RANK", -1), ("MASTER_ADDR", "MASTER_PORT")
    is_found = RENDEZVOUS_FILE in os.environ or all(map(os.environ.get, needed))
    if not (0 <= rank < n_processes() and is_found):
        raise _not_launched()
    return rank


def _launched(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise _not_launched() from None


def _not_launched() -> ValueError:
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    given = ", ".join(f"{name} {os.environ.get(name)!r}" for name in names)
    return ValueError(
        f"a launcher such as torchrun must set all of these environment variables, RANK below "
        f"WORLD_SIZE (got {given}); to run one process: unset WORLD_SIZE"
    )


def this_python() -> str:
    """The interpreter in use as a user would type it here, such as .venv/bin/python."""
    return shlex.quote(sys.executable.removeprefix(os.path.abspath(".") + os.sep))


def this_command() -> str:
    """The command `pretrain` as this shell would find it, for messages to copy: `make train` runs
    it from an environment that is not activated."""
    found = shutil.which("pretrain")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return "pretrain"
    path = os.environ.get("PYTHONPATH")  # as `make train PYTHON=...` sets it
    variable = f"PYTHONPATH={shlex.quote(path)} " if path else ""
    return f"{variable}{this_python()} -m pretrain"


def install_command(package: str, *, extra: str) -> str:
    """The command that installs an optional package: the extra of a clone, as README has it. No
    package index has `pretrain` itself."""
    clone = Path(__file__).parents[2]
    folder = "." if clone == Path(os.path.abspath(".")) else clone
    is_clone = (clone / "pyproject.toml").is_file()
    what = f"-e '{folder}[{extra}]'" if is_clone else shlex.quote(package)
    return f"{this_python()} -m pip install {what}"


def memory_bytes() -> int | None:
    """Memory of this machine, or less in a container; None if the system does not report it."""
    limits = [limit for (limit,) in _limits("memory", ["memory.max"], ["memory.limit_in_bytes"])]
    with suppress(AttributeError, OSError, ValueError):  # Windows, and systems with other names
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=None)


def keep_freed_memory(keep: bool = True) -> None:
    """Let glibc use freed memory again, instead of returning it to the system, which for each large
    tensor of each step would fill new pages with zeros: a sixth of a step. Or no longer."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt, m_trim_threshold, m_mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(m_trim_threshold, (1 << 31) - 1 if keep else 1 << 17)
        # Some versions take at most 1 << 25.
        any(mallopt(m_mmap_threshold, n) for n in ((1 << 30, 1 << 25) if keep else (1 << 17,)))


def free_memory() -> None:
    """Collect unused objects, and return their memory to the system, of which glibc keeps hundreds
    of megabytes."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def usable_cores() -> int:
    """Cores that this process may use. A container may have fewer than the machine, or a share of
    their time, which is rounded up."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quotas = _limits("cpu", ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"])
    return min([cores, *(ceil(quota / period) for quota, period in quotas if quota > 0)])


def default_threads(n_processes_here: int) -> int:
    """CPU threads of each process: OMP_NUM_THREADS, or its share of the cores."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    # torchrun sets it to 1 where the user has not.
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and RENDEZVOUS_FILE not in os.environ
    if threads.isdecimal() and int(threads) and not (by_torchrun and threads == "1"):
        return int(threads)
    return max(1, usable_cores() // n_processes_here)


def _limits(controller: str, *files: Sequence[str]) -> Iterator[list[int]]:
    """Yield the limits of this process's control group and of those around it: the numbers of each
    of `files`, those of version 2 and of version 1 (Linux, cgroups(7))."""
    groups = []
    with suppress(OSError):
        groups = (_PROCESS / "cgroup").read_text().splitlines()
    for line in groups:  # 4:cpu,cpuacct:/PATH, or 0::/PATH in version 2
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Seen from within a container the path may be missing, and its last parent be the group.
        both = [_CONTROL_GROUPS / name / path.strip("/") for name in (controllers, controller)]
        for group, names in product([each for own in both for each in (own, *own.parents)], files):
            with suppress(OSError, ValueError):  # no such file, or "max"
                yield [int(n) for name in names for n in (group / name).read_text().split()]


def yield_idle_cores() -> None:
    """Let idle OpenMP threads sleep soon, unless the user has chosen a policy. Must be called
    before torch is imported, which reads the variable (docs/explanation/speed.md has the gain)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
