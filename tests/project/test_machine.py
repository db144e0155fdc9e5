"""What the system tells about memory and cores, also where it tells less than Linux does."""

from __future__ import annotations

import os
import platform
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain import machine
from pretrain.distributed import open_world
from pretrain.machine import default_threads, memory_bytes, usable_cores


def in_group(
    monkeypatch: pytest.MonkeyPatch, folder: Path, groups: str, files: dict[str, str]
) -> None:
    """Let this process be in control groups with these files."""
    for name, text in files.items():
        (folder / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "groups" / name).write_text(text + "\n")
    (folder / "cgroup").write_text(groups + "\n")
    monkeypatch.setattr(machine, "_PROCESS", folder)
    monkeypatch.setattr(machine, "_CONTROL_GROUPS", folder / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))


V1_GROUPS = "5:memory:/a/b\n4:cpu,cpuacct:/a/b\n0::/a"
V1_FILES = {
    "cpu/a/b/cpu.cfs_quota_us": "-1",
    "cpu/a/b/cpu.cfs_period_us": "100000",
    "cpu/a/cpu.cfs_quota_us": "250000",
    "cpu/a/cpu.cfs_period_us": "100000",
    "memory/a/b/memory.limit_in_bytes": "9223372036854771712",  # its word for no limit
    "memory/a/memory.limit_in_bytes": "1000000",
}


@pytest.mark.parametrize(
    ("groups", "files", "cores", "n_bytes"),
    [
        ("0::/", {"cpu.max": "50000 100000", "memory.max": "max"}, 1, None),  # docker --cpus 0.5
        ("0::/", {"cpu.max": "max 100000", "memory.max": "2000000"}, 64, 2_000_000),
        # The tighter limit counts, of the pod or of the container in it.
        ("0::/pod/c", {"pod/cpu.max": "200000 100000", "pod/c/cpu.max": "800000 100000"}, 2, None),
        ("0::/pod/c", {"pod/memory.max": "9000", "pod/c/memory.max": "7000"}, 64, 7000),
        # The host's name of a group that the container sees as the root.
        ("0::/docker/1a2b", {"cpu.max": "300000 100000", "memory.max": "5000"}, 3, 5000),
        (V1_GROUPS, V1_FILES, 3, 1_000_000),
        (V1_GROUPS, {k.replace("cpu/", "cpu,cpuacct/"): v for k, v in V1_FILES.items()}, 3, 10**6),
        ("4:cpu,cpuacct:/docker/1a", {k[4:]: v for k, v in V1_FILES.items()}, 64, None),
        ("0::/nowhere", {}, 64, None),
    ],
)
def test_a_container_has_its_share_of_cores_and_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str,
    files: dict[str, str],
    cores: int,
    n_bytes: int | None,
) -> None:
    """cgroups(7) of version 2 (Linux 4.5) and 1. ml-agents issue 4471 (2020): threads for all cores
    of a machine are slower than the share that a container has."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    in_group(monkeypatch, tmp_path, groups, files)
    assert (usable_cores(), memory_bytes()) == (cores, n_bytes or whole)


@pytest.mark.parametrize(
    ("environment", "n_processes_here", "threads"),
    [
        ({}, 1, 64),
        ({}, 4, 16),
        ({"OMP_NUM_THREADS": "3"}, 4, 3),
        ({"OMP_NUM_THREADS": "3,2"}, 1, 3),  # of nested regions (OpenMP 5.2, section 21.1.2)
        ({"OMP_NUM_THREADS": ""}, 1, 64),
        ({"OMP_NUM_THREADS": "0"}, 1, 64),
        ({"OMP_NUM_THREADS": "all"}, 1, 64),
        # torchrun (torch 2.13) sets 1 where the user has not.
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 4, 16),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, 4, 2),
        (
            {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", machine.RENDEZVOUS_FILE: "x"},
            4,
            1,
        ),
    ],
)
def test_threads_are_those_of_omp_num_threads_or_a_share_of_the_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    n_processes_here: int,
    threads: int,
) -> None:
    in_group(monkeypatch, tmp_path, "0::/", {})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_threads(n_processes_here) == threads


LAUNCHER = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "two"},
        {"RANK": None},
        {"RANK": "2"},
        {"RANK": "-1"},
        {"RANK": ""},
        {"MASTER_ADDR": None},
        {"MASTER_PORT": ""},
        {"MASTER_PORT": "http"},
    ],
)
def test_variables_of_a_launcher_that_do_not_belong_together_are_named(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str | None]
) -> None:
    """ignite issue 2048 (2021): a shell has WORLD_SIZE from the job that it was opened in."""
    for name, value in {**LAUNCHER, **wrong}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="WORLD_SIZE") as error:
        open_world("cpu", threads=1, timeout_seconds=1)
    assert "invalid literal" not in str(error.value) or wrong == {"MASTER_PORT": "http"}


def test_a_world_that_is_alone_reads_no_variables_of_a_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**LAUNCHER, "LOCAL_WORLD_SIZE": "many"}.items():
        monkeypatch.setenv(name, value)
    assert open_world("cpu", alone=True).size == 1


def test_processes_that_nobody_starts_are_waited_for_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {**LAUNCHER, "RANK": "0", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="rank 0 did not find the other processes of WORLD_SIZE 2"):
        open_world("cpu", threads=1, timeout_seconds=1)


def test_cores_and_memory_of_a_system_that_does_not_report_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_PROCESS", tmp_path)  # in no control group
    assert memory_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert memory_bytes() is None
    assert usable_cores() == 1


def test_peak_memory_in_the_unit_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux counts in KiB, macOS in bytes, Windows has no module `resource`."""
    world = open_world("cpu", threads=1)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert world.peak_memory_bytes() == usage.ru_maxrss * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert world.peak_memory_bytes() == usage.ru_maxrss
    monkeypatch.setitem(sys.modules, "resource", None)
    assert world.peak_memory_bytes() == 0


@pytest.mark.parametrize("units", [{}, {"avx512_bf16": True}, {"amx_bf16": True}, None])
def test_native_bfloat16_is_what_the_processor_reports(
    monkeypatch: pytest.MonkeyPatch, units: dict[str, bool] | None
) -> None:
    """None: before torch 2.13, which does not tell."""
    if units is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert open_world("cpu", threads=1).has_native_bf16() == bool(units)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_used_again_or_returned(keep: bool) -> None:
    program = (
        "import resource, torch; from pretrain.machine import keep_freed_memory\n"
        f"keep_freed_memory(); keep_freed_memory({keep})\n"
        "def fault():\n"
        "    torch.ones(1 << 22); return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "faults = [fault() for _ in range(40)]\n"
        "print(faults[-1] - faults[-11])"  # the first ones find other free places
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Ten times 4,096 pages, fewer where the system gives large ones.
    assert (int(done.stdout) < 20) == keep
