"""Verify that a resume of a run equals an uninterrupted run, bit for bit, on this machine.

The help of `pretrain verify` says which runs are compared. Each is a process of its own:
python -m pretrain.selftest.verify FOLDER --stop-after N | --kill-after N.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pretrain import __version__
from pretrain.checkpoint.load import Checkpoint, checkpoint_name, list_checkpoints
from pretrain.config import RunConfig, to_yaml
from pretrain.machine import n_processes
from pretrain.run.directory import (
    CHECKPOINTS,
    CLOCK,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    SAMPLES,
    TOKENIZER,
    VERIFICATION,
    read_environment,
    write_json,
)
from pretrain.run.identity import code_hash
from pretrain.run.log import METRICS_KEYS, TIMES, RunLog
from pretrain.runner.checks import lr_schedule_of, read_run_config, settings_of
from pretrain.runner.launch import ProcessFailed, launch
from pretrain.runner.start import Request, start
from pretrain.runner.text import Log
from pretrain.selftest import DIFFERS, EXACT, NOT_JUDGED, Check, Report, judge, max_difference
from pretrain.train.build import rows_of
from pretrain.train.config import filled

_PROGRAM = ("-m", "pretrain.selftest.verify")
# A test replaces it by a worker with a planted fault.
WORKER = [sys.executable, *_PROGRAM]
# Relative difference of losses with another micro-batch size in float32, where the same numbers are
# summed in another order. In bfloat16 rounding errors grow from step to step.
_MAX_DIFFERENCE = 1e-5


def verify(folder: Path, n_steps: int, log: Log) -> dict[str, Any]:
    """Verify a run over 2 x `n_steps` steps, or fewer if it is shorter.

    Returns the content of verification.json. Raises ValueError under torchrun and for a run of
    fewer than three steps.
    """
    if n_processes() > 1:
        raise ValueError("verify starts processes itself: run it without torchrun")
    config = read_run_config(folder)
    most = (lr_schedule_of(folder, config).steps - 1) // 2
    if most < 1:
        raise ValueError(
            f"{folder} must have at least 3 steps to be verified (it has {config.train.steps}); "
            "train a longer run"
        )
    if n_steps < 1:
        raise ValueError(f"--steps must be at least 1 (got {n_steps}): the steps of each half")
    result = compare_runs(folder, config, min(n_steps, most), log)
    print_, machine = result["fingerprint"], result["machine"]
    log(
        f"verdict: {result['verdict']}, with pretrain {print_['pretrain']} (code {print_['code']}),"
        f" torch {print_['torch']}, {print_['device']}, {print_['threads']} threads, "
        f"{machine['gpu'] or machine['cpu']}"
    )
    write_json(folder / VERIFICATION, result)
    return result


def compare_runs(folder: Path, config: RunConfig, k: int, log: Log) -> dict[str, Any]:
    """Train the runs and compare them. Their folders are kept if any check fails."""
    log(f"{folder}: {k} + {k} steps, killed between, against {2 * k} steps, with its own settings")
    work = Path(tempfile.mkdtemp(prefix="pretrain-verify-"))
    report = Report(log)
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, work)
        # What the run's clock decided holds for the copies, which decide nothing themselves.
        train = replace(config.train, save_every=k, evaluate_every=k, minutes=None)
        settings = replace(
            config,
            train=train,
            evaluate=replace(config.evaluate, every=k),
            report=replace(config.report, to=()),
        )

        straight = _copy_run(folder, work / "straight", settings)
        _train(straight, "--stop-after", 2 * k)
        killed = _copy_run(folder, work / "killed", settings)
        _train(killed, "--kill-after", k + max(1, k // 2))
        checks = {"killed": _check_kill(killed, k)}
        _train(killed, "--stop-after", 2 * k)
        checks |= compare(straight, killed, 2 * k)

        rows = _other_micro_batch(config)
        if rows is None:
            checks["micro-batch"] = Check(NOT_JUDGED, "a batch is one window")
        else:
            fp32 = replace(train, precision="fp32")
            reference = straight
            if train.precision != "fp32":
                reference = _copy_run(folder, work / "float32", replace(settings, train=fp32))
                _train(reference, "--stop-after", 2 * k)
            changed = replace(settings, train=replace(fp32, micro_batch_rows=rows))
            other = _copy_run(folder, work / "micro-batch", changed)
            _train(other, "--stop-after", 2 * k)
            losses = [[r["loss"] for r in _records(f, is_train=True)] for f in (reference, other)]
            what = f"{rows} rows at once instead of {train.micro_batch_rows}, in float32"
            checks["micro-batch"] = judge(max_difference(*losses), _MAX_DIFFERENCE, what)

        for name, check in checks.items():
            report.add(name, check)
        environment = read_environment(straight)
        environment["fingerprint"].pop("settings")
        if report.failed():
            log(f"the runs are kept in {work}")
            cleanup.pop_all()
    return {
        "verdict": DIFFERS if report.failed() else EXACT,
        "steps": [k, 2 * k],
        "checks": report.to_json(),
        "run": environment["run"],
        "fingerprint": environment["fingerprint"],
        "machine": {key: environment.get(key) for key in ("platform", "cpu", "gpu", "python")},
    }


# --- the runs ----------------------------------------------------------------------------------


def _copy_run(run: Path, folder: Path, config: RunConfig) -> Path:
    """Create a run with the same text and tokenizer that has no steps yet."""
    folder.mkdir()
    shutil.copytree(run / TOKENIZER, folder / TOKENIZER)
    if (run / CLOCK).exists():
        shutil.copy(run / CLOCK, folder)
    environment = read_environment(run)
    # The verdict is about today's code on the run's text.
    today = {"pretrain": __version__, "code": code_hash(), "torch": torch.__version__}
    environment["fingerprint"] |= today | {"settings": settings_of(config)}
    write_json(folder / ENVIRONMENT, environment)
    (folder / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    return folder


def _train(folder: Path, option: str, step: int) -> None:
    """Train a run until a step, in a process that stops there or is killed."""
    exit_code = -signal.SIGKILL if option == "--kill-after" else 0
    run_process([*WORKER, str(folder), option, str(step)], exit_code=exit_code)


def run_process(command: Sequence[str], *, exit_code: int = 0) -> None:
    """Run a command. ValueError with its last lines if it does not end with `exit_code`."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != exit_code:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ValueError(f"a worker ended with exit code {done.returncode}:\n{last_lines}")


def main(args: Sequence[str]) -> int:
    """Train a run until a step, and stop there or be killed; in the processes that its config
    requests."""
    start_time = time.perf_counter()
    folder, is_killed, step = Path(args[0]), args[1] == "--kill-after", int(args[2])
    n = read_run_config(folder).parallel.processes
    if n > 1 and n_processes() == 1:
        try:
            return launch(args, n, program=_PROGRAM)
        except ProcessFailed as error:
            if not is_killed or error.signal != signal.SIGKILL:
                print(error, file=sys.stderr)
                return error.exit_code
            os.kill(os.getpid(), signal.SIGKILL)  # like the processes that it launched
    request = Request(
        kind="resume",
        folder=folder,
        planned_stop=("kill" if is_killed else "stop", step),
        start_time=start_time,
    )
    return start(request).exit_code


# --- comparisons -------------------------------------------------------------------------------


def _check_kill(folder: Path, k: int) -> Check:
    """Check that the process was killed after the checkpoint of step k, not at it."""
    last_step = max((record["step"] for record in RunLog(folder).metrics()), default=0)
    saved = [path.name for path in list_checkpoints(folder / CHECKPOINTS)]
    if saved[-1:] != [checkpoint_name(k)] or last_step <= k:
        return Check(DIFFERS, f"{last_step} steps; checkpoints: {', '.join(saved) or 'none'}")
    return Check(EXACT, f"by SIGKILL after step {last_step}, resumed from step {k}")


def compare(one: Path, other: Path, step: int) -> dict[str, Check]:
    """Compare two runs up to a step, bit by bit."""
    folders = (one, other)
    first, second = (Checkpoint(f / CHECKPOINTS / checkpoint_name(step)) for f in folders)
    numbers = METRICS_KEYS["train"].keys() - {"ids", *TIMES}
    evaluated = [_records(folder, is_train=False) for folder in folders]
    files = [folder / SAMPLES for folder in folders]
    samples = [file.read_bytes() if file.is_file() else b"" for file in files]
    return {
        "order": _same_steps(one, other, ["step", "ids"], "the batches of {} steps"),
        "losses": _same_steps(
            one, other, sorted(numbers), "losses, gradient norms and all other metrics of {} steps"
        ),
        "evaluations": Check(EXACT, f"{len(evaluated[0])} evaluations and their samples")
        if evaluated[0] == evaluated[1] and samples[0] == samples[1]
        else Check(DIFFERS, f"{METRICS} or {SAMPLES} of the two"),
        "weights": _same_tensors(first, second, "model"),
        "optimizer": _same_tensors(first, second, "optimizer"),
    }


def _records(folder: Path, *, is_train: bool) -> list[dict[str, Any]]:
    """Return the metrics of training steps, or the other ones, without times."""
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in RunLog(folder).metrics()
        if (record["kind"] == "train") == is_train
    ]


def _same_steps(one: Path, other: Path, keys: Iterable[str], what: str) -> Check:
    """Compare these keys of the metrics of every step."""
    rows = [_records(folder, is_train=True) for folder in (one, other)]
    for first, second in zip(*rows, strict=False):
        different = [key for key in keys if first.get(key) != second.get(key)]
        if different:
            found = ", ".join(f"{k} {first.get(k)} and {second.get(k)}" for k in different)
            return Check(DIFFERS, f"step {first['step']}: {found}")
    if len(rows[0]) != len(rows[1]):
        return Check(DIFFERS, f"{len(rows[0])} steps against {len(rows[1])}")
    return Check(EXACT, what.format(len(rows[0])))


def _same_tensors(one: Checkpoint, other: Checkpoint, group: str) -> Check:
    """Compare all tensors of a group, byte by byte."""
    names = one.names(group)
    if names != other.names(group):
        return Check(DIFFERS, f"{len(names)} tensors against {len(other.names(group))}")
    digest, n_numbers = hashlib.sha256(), 0
    for name in names:
        first, second = (each.read(f"{group}/{name}").contiguous() for each in (one, other))
        views = [tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)]
        if not torch.equal(*views) or first.dtype != second.dtype:
            difference = float((first.double() - second.double()).abs().max())
            return Check(DIFFERS, f"{name}: by up to {difference:.3g}")
        digest.update(views[0].numpy().data)
        n_numbers += first.numel()
    return Check(
        EXACT, f"{len(names)} tensors, {n_numbers:,} numbers, sha256 {digest.hexdigest()[:16]}"
    )


def _other_micro_batch(config: RunConfig) -> int | None:
    """Return half a micro-batch, or two windows in place of one, if a process has two."""
    axes = config.parallel.resolve(config.parallel.processes)
    batch_size = filled(config.train.batch_tokens) // config.model.window_tokens
    n_own = len(rows_of(0, axes, batch_size, micro_batch_rows=1))
    return min(filled(config.train.micro_batch_rows), n_own) // 2 or (2 if n_own > 1 else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
