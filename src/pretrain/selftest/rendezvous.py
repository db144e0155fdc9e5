"""Check that several processes can train together. Each of them runs `check_processes`; rank 0
reports."""

from __future__ import annotations

import json
import platform
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.parallel.config import ParallelConfig
from pretrain.selftest import AGREES, DIFFERS, Check, Log, check_line, failed, to_json
from pretrain.selftest.tiny_run import STEPS, losses, max_difference

if TYPE_CHECKING:
    from pretrain.distributed import World

# Clocks are read when all processes leave a barrier, which takes milliseconds.
_CLOCK_TOLERANCE_SECONDS = 1.0
_REDUCED_BYTES = 16 << 20
_N_REDUCTIONS = 5


def check_processes(device: str, log: Log) -> dict[str, Any] | None:
    """Run all checks, and return what --json prints; None on ranks other than 0."""
    from pretrain.distributed import open_world

    start_time = time.perf_counter()
    world = open_world(device, timeout_seconds=60)
    hosts = sorted(set(world.all_gather_str(platform.node())))
    seconds = time.perf_counter() - start_time
    checks: dict[str, Check] = {}

    def add(name: str, check: Check) -> None:
        checks[name] = check
        if world.is_main:
            log(check_line(name, check))

    size_and_hosts = f"{world.size} processes on {', '.join(hosts)}"
    add("meeting", Check(AGREES, f"{size_and_hosts}, in {seconds:.1f} s"))
    add("versions", _check_versions(world))
    add("clocks", _check_clocks(world))
    add("folder", _check_folder(world))
    add("sums", _check_sums(world))
    add("copies", _check_axes(world, ParallelConfig()))
    add("shards", _check_axes(world, ParallelConfig(shard=world.size)))
    if world.size % 2 == 0 and world.size > 2:
        add("both", _check_axes(world, ParallelConfig(shard=2)))
    add("elastic", _check_axes(world, ParallelConfig(elastic=True)))
    world.leave()

    if not world.is_main:
        return None
    wrong = failed(checks)
    log(f"wrong: {', '.join(wrong)}" if wrong else "these processes are fine")
    return {"processes": world.size, "hosts": hosts, "checks": to_json(checks), "wrong": wrong}


def _check_versions(world: World) -> Check:
    import torch

    from pretrain import __version__
    from pretrain.run.identity import code_hash

    own = {"pretrain": __version__, "code": code_hash(), "torch": torch.__version__}
    versions = [json.loads(text) for text in world.all_gather_str(json.dumps(own))]
    for rank, other in enumerate(versions):
        for name, value in versions[0].items():
            if other[name] != value:
                return Check(DIFFERS, f"{name} is {value} on rank 0, {other[name]} on rank {rank}")
    return Check(AGREES, ", ".join(f"{name} {value}" for name, value in versions[0].items()))


def _check_clocks(world: World) -> Check:
    world.all_gather([0.0])  # a barrier: all ranks leave it at about the same time
    times = [now for (now,) in world.all_gather([time.time()])]
    difference = max(times) - min(times)
    return Check(
        AGREES if difference < _CLOCK_TOLERANCE_SECONDS else DIFFERS,
        f"at most {difference:.3f} s apart (tolerance {_CLOCK_TOLERANCE_SECONDS:g} s)",
    )


def _check_folder(world: World) -> Check:
    """Check that all ranks see what rank 0 writes into the current folder, where runs go."""
    token = world.broadcast_str(secrets.token_hex(8))
    with tempfile.TemporaryDirectory(dir=".", prefix=".doctor-") as own:
        path = Path(world.broadcast_str(own)) / "token"
        if world.is_main:
            path.write_text(token)
        world.all_gather([0.0])  # a barrier
        is_visible = path.is_file() and path.read_text() == token
        blind = [rank for rank, (seen,) in enumerate(world.all_gather([is_visible])) if not seen]
    if blind:
        return Check(DIFFERS, f"ranks {blind} do not see what rank 0 writes into {Path.cwd()}")
    return Check(AGREES, "all ranks see what rank 0 writes into this folder")


def _check_sums(world: World) -> Check:
    """Compare an all-reduce with its known result, and measure its bandwidth."""
    import torch

    n = _REDUCED_BYTES // 4
    numbers = torch.arange(n, dtype=torch.float32, device=world.device) % 1000
    best_seconds = float("inf")
    for _ in range(_N_REDUCTIONS):
        own = numbers * (world.rank + 1)
        world.all_gather([0.0])  # a barrier
        start_time = time.perf_counter()
        world.all_reduce_(own)
        world.synchronize()
        best_seconds = min(best_seconds, time.perf_counter() - start_time)
        if not torch.equal(own, numbers * (world.size * (world.size + 1) // 2)):
            return Check(DIFFERS, f"a sum over processes is wrong on rank {world.rank}")
    # What a ring sends: "Bandwidth optimal all-reduce algorithms" (Patarasuk and Yuan, 2009).
    bandwidth = 2 * (world.size - 1) / world.size * _REDUCED_BYTES / best_seconds
    return Check(
        AGREES,
        f"{_REDUCED_BYTES >> 20} MiB in {1e3 * best_seconds:.1f} ms, {bandwidth / 1e9:.2f} GB/s",
    )


def _check_axes(world: World, parallel: ParallelConfig) -> Check:
    """Compare the losses of all processes together with those of one."""
    import torch

    dtype, tolerance = torch.float32, 1e-5
    if world.device.type == "cpu":  # other devices may have no float64
        dtype, tolerance = torch.float64, 1e-9
    if parallel.elastic:  # the deterministic reduction must be exact
        tolerance = 0.0
    elastic = ParallelConfig(elastic=True) if parallel.elastic else None
    alone = losses(world.single_process(), dtype, 2, parallel=elastic)
    together = losses(world, dtype, 2, parallel=parallel)
    own_difference = max_difference(alone, together)
    difference = max(each for (each,) in world.all_gather([own_difference]))
    return Check(
        AGREES if difference <= tolerance else DIFFERS,
        f"losses of {STEPS} steps: {difference:.1e} from those of one process (tolerance "
        f"{tolerance:.0e})",
    )
