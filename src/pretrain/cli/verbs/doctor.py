"""Check this machine in about a minute: that what it computes repeats, resumes, compiles and is
kept; or several processes, that they meet, agree, and compute what one does.

pretrain doctor
pretrain doctor --processes 4                                          on this machine
torchrun --nnodes 2 --nproc-per-node 8 ... -m pretrain doctor          on each of two
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.meeting import meet
from pretrain.cli.output import Output
from pretrain.cli.trial import STEPS, furthest, losses
from pretrain.cli.verbs.verify import AGREES, DIFFERS, NOT_JUDGED, Check, prove
from pretrain.distributed import n_processes
from pretrain.runner.checks import read_run_config
from pretrain.runner.launch import launch_once

if TYPE_CHECKING:
    from pretrain.distributed import World

_SETTINGS = (
    "--model.family gpt2 --model.n_layers 2 --model.n_heads 2 --model.d_model 64 "
    "--model.context_length 32 --model.dropout 0.1 "
    "--train.batch_tokens 512 --train.micro_batch_rows 8 --train.steps 40"
).split()
_SAVED_BYTES = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="how many meet [1]")


def run(arguments: argparse.Namespace, output: Output) -> int:
    from pretrain.distributed import describe_machine, open_world

    if n_processes() > 1:
        return meet(arguments.device, output)
    if arguments.processes < 1:
        raise ValueError(f"--processes is {arguments.processes}; it must be at least 1")
    if arguments.processes > 1:
        words = ["doctor", "--device", arguments.device, *["--json"] * arguments.json]
        return launch_once(words, arguments.processes)
    world = open_world(arguments.device)
    machine = {**describe_machine(), "device": world.device.type, "threads": world.threads}
    for name, value in machine.items():
        output.say(f"  {name:<12} {value}")
    checks = {
        "disk": _disk(),
        "repeat": _repeat(world),
        "micro-batch": _accumulation(world),
        "compile": _compiled(world),
    }
    for name, check in checks.items():
        output.say(f"  {name:<12} {check.verdict:<10}  {check.found}")
    resume = _resume(arguments.device, output)
    wrong = [name for name, check in checks.items() if check.verdict == DIFFERS]
    if resume["verdict"] == DIFFERS:
        wrong.append("resume")
    output.say("this machine is fine" if not wrong else f"wrong: {', '.join(wrong)}")
    output.result(
        {
            "machine": machine,
            "checks": {n: {"verdict": c.verdict, "found": c.found} for n, c in checks.items()},
            "resume": resume,
            "wrong": wrong,
        }
    )
    return 1 if wrong else 0


def _disk() -> Check:
    """A checkpoint in the folder that one stands in, where runs go."""
    import torch

    from pretrain.checkpoint import save_checkpoint
    from pretrain.checkpoint.save import verify_saved

    tensors = {"model/w": torch.arange(_SAVED_BYTES // 4, dtype=torch.int32)}
    with tempfile.TemporaryDirectory(dir=".", prefix=".doctor-") as name:
        began = time.perf_counter()
        path = save_checkpoint(Path(name), step=1, tensors=tensors, state={})
        saved = time.perf_counter()
        verify_saved(path)
        read = time.perf_counter()
    speeds = (_SAVED_BYTES / 1e6 / seconds for seconds in (saved - began, read - saved))
    return Check(AGREES, "saved to the disk at {:,.0f} MB/s, verified at {:,.0f}".format(*speeds))


def _repeat(world: World) -> Check:
    import torch

    one, other = (losses(world, torch.float32, 16) for _ in range(2))
    if one == other:
        return Check(AGREES, f"{STEPS} steps twice, with dropout: the same losses to the bit")
    return Check(DIFFERS, f"losses differ by {furthest(one, other):.1e} from one run to the next")


def _accumulation(world: World) -> Check:
    import torch

    found, most = [], 0.0
    # Only a CPU has fast float64 for sure; there is none at all in MPS.
    kinds = {torch.float32: 1e-5}
    if world.device.type == "cpu":
        kinds[torch.float64] = 1e-9
    for dtype, bound in kinds.items():
        far = furthest(losses(world, dtype, 16), losses(world, dtype, 4))
        found.append(f"{far:.1e} in {str(dtype).removeprefix('torch.')} (legal {bound:.0e})")
        most = max(most, far / bound)
    return Check(AGREES if most <= 1 else DIFFERS, "16 rows against 4 x 4: " + ", ".join(found))


def _compiled(world: World) -> Check:
    import torch

    began = time.perf_counter()
    try:
        compiled = losses(world, torch.float32, 16, compiled=True)
    except Exception as error:  # no compiler is no fault of a machine that never compiles
        return Check(NOT_JUDGED, f"torch.compile fails here: {' '.join(str(error).split())[:60]}")
    seconds = time.perf_counter() - began
    far = furthest(losses(world, torch.float32, 16), compiled)
    text = f"losses differ by {far:.1e} from eager ones (legal 1e-05), {seconds:.0f} s to compile"
    return Check(AGREES if far <= 1e-5 else DIFFERS, text)


def _resume(device: str, output: Output) -> dict[str, Any]:
    """A small run on some of the bundled text, killed and resumed."""
    from pretrain.corpus import read_documents
    from pretrain.data import prepare

    with tempfile.TemporaryDirectory(prefix="pretrain-doctor-") as name:
        text, run_folder = Path(name) / "text.jsonl", Path(name) / "run"
        documents = list(read_documents("bundled"))[::8]
        lines = [json.dumps({"title": d.title, "text": d.text[:3000]}) for d in documents]
        text.write_text("\n".join(lines), encoding="utf-8")
        # A folder of its own: the user's cache is not for this.
        prepare(text, Path(name) / "prepared", vocab_size=400)
        words = [sys.executable, "-m", "pretrain", "train", str(Path(name) / "prepared")]
        words += [*_SETTINGS, "--run", str(run_folder), "--train.device", device]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        if done.returncode != 0:
            return {"verdict": DIFFERS, "error": done.stderr.strip()[-500:]}
        return prove(run_folder, read_run_config(run_folder), 10, say=output.say)
