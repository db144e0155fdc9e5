"""Whether several processes can train together: they meet, and check what a run relies on.

Each process runs this; the first one says what was found.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pretrain.cli.output import Output
from pretrain.cli.trial import STEPS, furthest, losses
from pretrain.cli.verbs.verify import AGREES, DIFFERS, Check
from pretrain.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from pretrain.distributed import World

# Clocks are compared by what processes say when they leave a meeting, which takes milliseconds.
_CLOCK_SECONDS = 1.0
_SUMMED_BYTES, _SUMS = 16 << 20, 5


class _Silent(Output):
    @property
    def people(self) -> TextIO:
        return open(os.devnull, "w")


def meet(device: str, output: Output) -> int:
    """Meet, check, and say what came of it; returns an exit code."""
    from pretrain.distributed import leave_world, open_world

    began = time.perf_counter()
    world = open_world(device, timeout_seconds=60)
    output = output if world.is_main else _Silent(json=False)
    hosts = sorted(set(world.all_gather_str(platform.node())))
    took = time.perf_counter() - began
    checks = {
        "meeting": Check(AGREES, f"{world.size} processes on {', '.join(hosts)}, in {took:.1f} s")
    }
    output.say(f"  {'meeting':<9} {AGREES:<10}  {checks['meeting'].found}")
    rest: dict[str, Callable[[World], Check]] = {
        "versions": _versions,
        "clocks": _clocks,
        "folder": _folder,
        "sums": _sums,
        **{name: _layout(layout) for name, layout in _layouts(world.size).items()},
    }
    for name, check in rest.items():
        checks[name] = check(world)
        output.say(f"  {name:<9} {checks[name].verdict:<10}  {checks[name].found}")
    leave_world(world)
    wrong = [name for name, check in checks.items() if check.verdict == DIFFERS]
    output.say("these processes are fine" if not wrong else f"wrong: {', '.join(wrong)}")
    found = {n: {"verdict": c.verdict, "found": c.found} for n, c in checks.items()}
    output.result({"processes": world.size, "hosts": hosts, "checks": found, "wrong": wrong})
    return 1 if wrong else 0


def _versions(world: World) -> Check:
    import torch

    from pretrain import __version__
    from pretrain.run.identity import code_hash

    mine = {"pretrain": __version__, "code": code_hash(), "torch": torch.__version__}
    told = [json.loads(text) for text in world.all_gather_str(json.dumps(mine))]
    for rank, other in enumerate(told):
        for name in mine:
            if other[name] != told[0][name]:
                text = f"{name} is {told[0][name]} in process 0, {other[name]} in process {rank}"
                return Check(DIFFERS, text)
    return Check(AGREES, ", ".join(f"{name} {value}" for name, value in told[0].items()))


def _clocks(world: World) -> Check:
    world.all_gather([0.0])  # all leave it at about the same time
    times = [now for (now,) in world.all_gather([time.time()])]
    apart = max(times) - min(times)
    verdict = AGREES if apart < _CLOCK_SECONDS else DIFFERS
    return Check(verdict, f"{apart:.3f} s apart at most (legal {_CLOCK_SECONDS:g})")


def _folder(world: World) -> Check:
    """Whether all see what the first one writes here, where runs go."""
    word = world.broadcast_str(secrets.token_hex(8))
    with tempfile.TemporaryDirectory(dir=".", prefix=".doctor-") as own:
        path = Path(world.broadcast_str(own)) / "word"
        if world.is_main:
            path.write_text(word)
        world.all_gather([0.0])
        sees = path.is_file() and path.read_text() == word
        blind = [rank for rank, (seen,) in enumerate(world.all_gather([sees])) if not seen]
    if blind:
        return Check(
            DIFFERS, f"processes {blind} do not see what process 0 writes into {Path.cwd()}"
        )
    return Check(AGREES, "all see what the first one writes into this folder")


def _sums(world: World) -> Check:
    """A sum that is known, and how fast it goes."""
    import torch

    n = _SUMMED_BYTES // 4
    whole = torch.arange(n, dtype=torch.float32, device=world.device) % 1000
    best = float("inf")
    for _ in range(_SUMS):
        mine = whole * (world.rank + 1)
        world.all_gather([0.0])
        began = time.perf_counter()
        world.all_reduce_(mine)
        world.synchronize()
        best = min(best, time.perf_counter() - began)
        if not torch.equal(mine, whole * (world.size * (world.size + 1) // 2)):
            return Check(DIFFERS, f"a sum over processes is wrong in process {world.rank}")
    # What a ring sends: "Bandwidth optimal all-reduce algorithms" (Patarasuk and Yuan, 2009).
    rate = 2 * (world.size - 1) / world.size * _SUMMED_BYTES / best
    return Check(AGREES, f"{_SUMMED_BYTES >> 20} MiB in {1e3 * best:.1f} ms, {rate / 1e9:.2f} GB/s")


def _layouts(size: int) -> dict[str, ParallelConfig]:
    found = {"copies": ParallelConfig(), "shards": ParallelConfig(shard=size)}
    if size % 2 == 0 and size > 2:
        found["both"] = ParallelConfig(shard=2)
    return {**found, "elastic": ParallelConfig(elastic=True)}


def _layout(layout: ParallelConfig) -> Callable[[World], Check]:
    def check(world: World) -> Check:
        import torch

        # Only a CPU has fast float64 for sure.
        is_cpu = world.device.type == "cpu"
        dtype, legal = (torch.float64, 1e-9) if is_cpu else (torch.float32, 1e-5)
        elastic = ParallelConfig(elastic=True) if layout.elastic else None
        alone = losses(world.single_process(), dtype, 2, parallel=elastic)
        found = losses(world, dtype, 2, parallel=layout)
        far = max(f for (f,) in world.all_gather([furthest(alone, found)]))
        if layout.elastic:
            text = f"losses of {STEPS} steps: {far:.1e} from one process's (legal: 0)"
            return Check(DIFFERS if far else AGREES, text)
        text = f"losses of {STEPS} steps: {far:.1e} from one process's (legal {legal:.0e})"
        return Check(AGREES if far <= legal else DIFFERS, text)

    return check
