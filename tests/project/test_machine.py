"""What the system tells about memory and cores, also where it tells less than Linux does."""

from __future__ import annotations

import os
import resource
import sys

import pytest
import torch

from pretrain.distributed import open_world
from pretrain.machine import memory_bytes, usable_cores


def test_cores_and_memory_of_a_system_that_does_not_report_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
