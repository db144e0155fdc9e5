"""This machine, and what a launcher says of the processes on it; without torch."""

from __future__ import annotations

import os

# How often an idle thread of GNU's OpenMP polls before it sleeps: about 70 microseconds. The
# default of 300,000 keeps a core from other threads, also from those of this program.
SPINS = 3000
# Names the file through which the processes of one machine find each other. A socket would be open
# to the network.
RENDEZVOUS_FILE = "PRETRAIN_RENDEZVOUS_FILE"


def n_processes() -> int:
    """Number of processes of the run, as set by the launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def n_local_processes() -> int:
    """Number of its processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", n_processes()))


def n_restarts() -> int:
    """How often the launcher has restarted the processes of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def memory_bytes() -> int | None:
    """Memory of this machine, or None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows, and systems with other names
        return None


def usable_cores() -> int:
    """Cores that this process may use; a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def yield_idle_cores() -> None:
    """Let idle OpenMP threads sleep soon, unless the user has chosen a policy. Must be called
    before torch is imported, which reads the variable (docs/explanation/speed.md has the gain)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
