"""Check this machine with one process: disk, repeated training, micro-batches, compiler, resume;
or several processes: that they connect, agree, and compute what one process does."""

from __future__ import annotations

import json
import platform
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain import __version__
from pretrain.checkpoint.save import save_checkpoint, verify_saved
from pretrain.config import compose
from pretrain.corpus.reading import read_documents
from pretrain.data.order import Order
from pretrain.data.preparation import prepare
from pretrain.distributed import World, describe_machine, open_world
from pretrain.evaluate.loss import Ids
from pretrain.model.decoder import build
from pretrain.model.loss import LMLoss
from pretrain.optim.config import OptimizerConfig
from pretrain.optim.param_groups import build_optimizer
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.model import parallelize
from pretrain.run.identity import code_hash
from pretrain.runner.checks import read_run_config
from pretrain.runner.launch import check_same_on_all_ranks
from pretrain.runner.text import Log
from pretrain.selftest import AGREES, DIFFERS, NOT_JUDGED, Check, Report, judge, max_difference
from pretrain.selftest.verify import compare_runs, run_process
from pretrain.train.build import TrainingBatches, rows_of
from pretrain.train.step import training_steps

# The small model that is trained, with dropout, on fixed random ids.
_STEPS = 8
_CONTEXT = 32
_SIZES = {
    "family": "gpt2",
    "n_layers": 2,
    "n_heads": 2,
    "d_model": 64,
    "context_length": _CONTEXT,
    "dropout": 0.1,
}
_BATCH_ROWS = 16
_VOCAB_SIZE = 211
_N_IDS = 5000
_SEED = 1
_SAVED_BYTES = 64 << 20
_REDUCED_BYTES = 16 << 20
_N_REDUCTIONS = 5
# Clocks are read when all processes leave a barrier, which takes milliseconds.
_CLOCK_TOLERANCE_SECONDS = 1.0


# --- one process -------------------------------------------------------------------------------


def check_machine(device: str, log: Log) -> dict[str, Any]:
    """Run all checks on one device, and return what --json prints."""
    world = open_world(device)
    machine = {**describe_machine(), "device": world.device.type, "threads": world.threads}
    for name, value in machine.items():
        log(f"  {name:<12} {value}")

    report = Report(log)
    report.add("disk", _measure_disk())
    difference = max_difference(losses(world, "float32", 16), losses(world, "float32", 16))
    report.add("repeat", judge(difference, 0.0, f"{_STEPS} steps twice, with dropout"))
    report.add("micro-batch", _check_micro_batch(world))
    report.add("compile", check_compile(world))
    resume = _check_resume(device, log)

    wrong = report.failed() + (["resume"] if resume["verdict"] == DIFFERS else [])
    log(f"wrong: {', '.join(wrong)}" if wrong else "this machine is fine")
    return {"machine": machine, "checks": report.to_json(), "resume": resume, "wrong": wrong}


def _measure_disk() -> Check:
    """Measure how fast a checkpoint is saved and verified in the current folder, where runs are
    written."""
    tensors = {"model/w": torch.arange(_SAVED_BYTES // 4, dtype=torch.int32)}
    with tempfile.TemporaryDirectory(dir=".", prefix=".doctor-") as name:
        start_time = time.perf_counter()
        path = save_checkpoint(Path(name), step=1, tensors=tensors, state={})
        save_time = time.perf_counter()
        verify_saved(path)
        verify_time = time.perf_counter()
    megabytes = _SAVED_BYTES / 1e6
    return Check(
        AGREES,
        f"saved to the disk at {megabytes / (save_time - start_time):,.0f} MB/s, verified at "
        f"{megabytes / (verify_time - save_time):,.0f}",
    )


def _check_micro_batch(world: World) -> Check:
    """Train with one micro-batch and with four."""
    details, verdict = [], AGREES
    for dtype, tolerance in _tolerances(world).items():
        difference = max_difference(losses(world, dtype, 16), losses(world, dtype, 4))
        if difference > tolerance:
            verdict = DIFFERS
        details.append(f"{difference:.1e} in {dtype} (tolerance {tolerance:.0e})")
    return Check(verdict, "16 rows against 4 x 4: " + ", ".join(details))


def _tolerances(world: World) -> dict[str, float]:
    """Return the types of numbers that the device has, with the difference of losses that rounding
    may cause."""
    only_on_cpu = {"float64": 1e-9} if world.device.type == "cpu" else {}
    return {"float32": 1e-5, **only_on_cpu}


def check_compile(world: World) -> Check:
    """Train with torch.compile and without."""
    start_time = time.perf_counter()
    try:
        compiled = losses(world, "float32", 16, compiled=True)
    except Exception as error:  # a machine without a compiler can train all the same
        message = " ".join(str(error).split())[:60]
        return Check(NOT_JUDGED, f"torch.compile fails here: {message}")
    seconds = time.perf_counter() - start_time
    difference = max_difference(losses(world, "float32", 16), compiled)
    return judge(difference, 1e-5, f"compiled in {seconds:.0f} s, against not compiled")


def _check_resume(device: str, log: Log) -> dict[str, Any]:
    """Verify a small run on some of the bundled text."""
    with tempfile.TemporaryDirectory(prefix="pretrain-doctor-") as name:
        folder = Path(name)
        documents = list(read_documents("bundled"))[::8]
        lines = [json.dumps({"title": d.title, "text": d.text[:3000]}) for d in documents]
        (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
        # Prepared here, so that the user's cache does not get it.
        prepare(folder / "text.jsonl", folder / "prepared", vocab_size=400)
        settings = {f"model.{key}": value for key, value in _SIZES.items()} | {
            "train.batch_tokens": 512,
            "train.micro_batch_rows": 8,
            "train.steps": 40,
            "train.device": device,
        }
        command = [sys.executable, "-m", "pretrain", "train", str(folder / "prepared")]
        command += ["--run", str(folder / "run")]
        try:
            run_process([*command, *(f"--{name}={value}" for name, value in settings.items())])
        except ValueError as error:
            return {"verdict": DIFFERS, "error": str(error)}
        return compare_runs(folder / "run", read_run_config(folder / "run"), 10, log)


# --- several processes -------------------------------------------------------------------------


def check_processes(device: str, log: Log) -> dict[str, Any] | None:
    """Check in each process that they can train together, and return what --json prints; None on
    ranks other than 0, which print nothing."""
    start_time = time.perf_counter()
    world = open_world(device, timeout_seconds=60)
    hosts = sorted(set(world.all_gather_str(platform.node())))
    seconds = time.perf_counter() - start_time
    report = Report(log if world.is_main else lambda line: None)
    size_and_hosts = f"{world.size} processes on {', '.join(hosts)}"
    report.add("meeting", Check(AGREES, f"{size_and_hosts}, in {seconds:.1f} s"))
    own = {"pretrain": __version__, "code": code_hash(), "torch": torch.__version__}
    try:
        check_same_on_all_ranks(world, own)
        versions = Check(AGREES, ", ".join(f"{name} {value}" for name, value in own.items()))
    except ValueError as error:
        versions = Check(DIFFERS, str(error))
    report.add("versions", versions)
    world.all_gather([0.0])  # a barrier: all ranks leave it at about the same time
    times = [now for (now,) in world.all_gather([time.time()])]
    difference = max(times) - min(times)
    verdict = AGREES if difference < _CLOCK_TOLERANCE_SECONDS else DIFFERS
    apart = f"at most {difference:.3f} s apart (tolerance {_CLOCK_TOLERANCE_SECONDS:g} s)"
    report.add("clocks", Check(verdict, apart))
    report.add("folder", _check_folder(world))
    report.add("sums", _check_sums(world))
    report.add("copies", _check_axes(world, ParallelConfig()))
    report.add("shards", _check_axes(world, ParallelConfig(shard=world.size)))
    if world.size % 2 == 0 and world.size > 2:
        report.add("both", _check_axes(world, ParallelConfig(shard=2)))
    report.add("elastic", _check_axes(world, ParallelConfig(elastic=True)))
    world.leave()

    if not world.is_main:
        return None
    wrong = report.failed()
    log(f"wrong: {', '.join(wrong)}" if wrong else "these processes are fine")
    return {"processes": world.size, "hosts": hosts, "checks": report.to_json(), "wrong": wrong}


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
    *_, (dtype, tolerance) = _tolerances(world).items()
    if parallel.elastic:  # the deterministic reduction must be exact
        tolerance = 0.0
    elastic = ParallelConfig(elastic=parallel.elastic)
    alone = losses(world.single_process(), dtype, 2, parallel=elastic)
    together = losses(world, dtype, 2, parallel=parallel)
    own_difference = max_difference(alone, together)
    difference = max(each for (each,) in world.all_gather([own_difference]))
    return judge(difference, tolerance, f"{_STEPS} steps, against one process")


# --- a tiny run --------------------------------------------------------------------------------


def losses(
    world: World,
    dtype: str,
    micro_batch_rows: int,
    *,
    compiled: bool = False,
    parallel: ParallelConfig | None = None,
) -> list[float]:
    """Train on all processes of `world`, and return the loss of each step in nats per token."""
    axes = (parallel or ParallelConfig()).resolve(world.size)
    # Weights of shards are initialised when each process has its own.
    device = torch.device("meta") if axes.shard > 1 else world.device
    config = compose([{"model": _SIZES}]).model
    decoder = build(config, vocab_size=_VOCAB_SIZE, seed=None, device=device)
    lm_loss = LMLoss(decoder.to(getattr(torch, dtype)), seed=_SEED)
    if compiled:
        lm_loss.compile_parts()
    model = parallelize(lm_loss, axes, world)
    model.initialize(_SEED)
    optimizer = build_optimizer(
        model.named_parameters(), config=OptimizerConfig(), orthogonalizer=model.orthogonalizer
    )
    ids = Ids(np.random.default_rng(_SEED).integers(0, _VOCAB_SIZE, _N_IDS))
    batches = TrainingBatches(
        stream=ids,  # type: ignore[arg-type]
        order=Order(_N_IDS, _CONTEXT, _SEED),
        batch_size=_BATCH_ROWS,
        micro_batch_rows=micro_batch_rows,
        byte_lengths_V=torch.ones(_VOCAB_SIZE, dtype=torch.int64),
        own_rows=rows_of(world.rank, axes, _BATCH_ROWS, micro_batch_rows=micro_batch_rows),
    )
    reports = training_steps(
        model, optimizer, batches.at, lr_at=lambda step: 3e-3, steps=_STEPS, world=world
    )
    return [report.nats_per_token for report in reports]
