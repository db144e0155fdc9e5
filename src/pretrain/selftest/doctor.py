"""Check this machine with one process: disk, repeated training, micro-batches, compiler, resume."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.runner.checks import read_run_config
from pretrain.selftest import AGREES, DIFFERS, NOT_JUDGED, Check, Log, check_line, failed, to_json
from pretrain.selftest.tiny_run import STEPS, losses, max_difference
from pretrain.selftest.verify import compare_runs

if TYPE_CHECKING:
    from pretrain.distributed import World

_SETTINGS = (
    "--model.family gpt2 --model.n_layers 2 --model.n_heads 2 --model.d_model 64 "
    "--model.context_length 32 --model.dropout 0.1 "
    "--train.batch_tokens 512 --train.micro_batch_rows 8 --train.steps 40"
).split()
_SAVED_BYTES = 64 << 20


def check_machine(device: str, log: Log) -> dict[str, Any]:
    """Run all checks on one device, and return what --json prints."""
    from pretrain.distributed import describe_machine, open_world

    world = open_world(device)
    machine = {**describe_machine(), "device": world.device.type, "threads": world.threads}
    for name, value in machine.items():
        log(f"  {name:<12} {value}")

    checks = {
        "disk": _check_disk(),
        "repeat": _check_repeat(world),
        "micro-batch": _check_micro_batch(world),
        "compile": check_compile(world),
    }
    for name, check in checks.items():
        log(check_line(name, check))
    resume = _check_resume(device, log)

    wrong = failed(checks)
    if resume["verdict"] == DIFFERS:
        wrong.append("resume")
    log(f"wrong: {', '.join(wrong)}" if wrong else "this machine is fine")
    return {"machine": machine, "checks": to_json(checks), "resume": resume, "wrong": wrong}


def _check_disk() -> Check:
    """Save and verify a checkpoint in the current folder, where runs are written."""
    import torch

    from pretrain.checkpoint.save import save_checkpoint, verify_saved

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


def _check_repeat(world: World) -> Check:
    """Train twice."""
    import torch

    first = losses(world, torch.float32, 16)
    second = losses(world, torch.float32, 16)
    if first == second:
        return Check(AGREES, f"{STEPS} steps twice, with dropout: the same losses bit for bit")
    difference = max_difference(first, second)
    return Check(DIFFERS, f"losses differ by {difference:.1e} from one run to the next")


def _check_micro_batch(world: World) -> Check:
    """Train with one micro-batch and with four."""
    import torch

    tolerances = {torch.float32: 1e-5}
    if world.device.type == "cpu":  # other devices may have no float64
        tolerances[torch.float64] = 1e-9
    details = []
    verdict = AGREES
    for dtype, tolerance in tolerances.items():
        difference = max_difference(losses(world, dtype, 16), losses(world, dtype, 4))
        if difference > tolerance:
            verdict = DIFFERS
        name = str(dtype).removeprefix("torch.")
        details.append(f"{difference:.1e} in {name} (tolerance {tolerance:.0e})")
    return Check(verdict, "16 rows against 4 x 4: " + ", ".join(details))


def check_compile(world: World) -> Check:
    """Train with torch.compile and without."""
    import torch

    start_time = time.perf_counter()
    try:
        compiled = losses(world, torch.float32, 16, compiled=True)
    except Exception as error:  # a machine without a compiler can train all the same
        message = " ".join(str(error).split())[:60]
        return Check(NOT_JUDGED, f"torch.compile fails here: {message}")
    seconds = time.perf_counter() - start_time
    difference = max_difference(losses(world, torch.float32, 16), compiled)
    return Check(
        AGREES if difference <= 1e-5 else DIFFERS,
        f"losses differ by {difference:.1e} from eager ones (tolerance 1e-05), {seconds:.0f} s to "
        "compile",
    )


def _check_resume(device: str, log: Log) -> dict[str, Any]:
    """Verify a small run on some of the bundled text."""
    from pretrain.corpus.reading import read_documents
    from pretrain.data.preparation import prepare

    with tempfile.TemporaryDirectory(prefix="pretrain-doctor-") as name:
        folder = Path(name)
        documents = list(read_documents("bundled"))[::8]
        lines = [json.dumps({"title": d.title, "text": d.text[:3000]}) for d in documents]
        (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
        # Prepared here, so that the user's cache does not get it.
        prepare(folder / "text.jsonl", folder / "prepared", vocab_size=400)
        command = [sys.executable, "-m", "pretrain", "train", str(folder / "prepared"), *_SETTINGS]
        command += ["--run", str(folder / "run"), "--train.device", device]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        if done.returncode != 0:
            return {"verdict": DIFFERS, "error": done.stderr.strip()[-500:]}
        return compare_runs(folder / "run", read_run_config(folder / "run"), 10, log)
