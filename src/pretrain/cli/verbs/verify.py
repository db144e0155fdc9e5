"""Prove that a resume of a run equals an uninterrupted run, bit for bit, on this machine.

pretrain verify runs/english-1

From the run's own settings 2 K steps are trained without a break; and again, killed by SIGKILL
between K and 2 K, and resumed from the disk. What a step read, losses, weights, optimizer,
evaluations and samples are compared. A third leg, in float32, has another micro-batch.
RUN/verification.json keeps the verdict.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import __version__
from pretrain.cli.output import Output
from pretrain.config import RunConfig, to_yaml
from pretrain.distributed import n_processes
from pretrain.run.directory import ENVIRONMENT, METRICS, SAMPLES, read_environment, write_json
from pretrain.run.log import RunLog
from pretrain.runner.checks import read_run_config
from pretrain.runner.previous import settings_of

if TYPE_CHECKING:
    from pretrain.checkpoint import Checkpoint

# A test puts a leg with a planted fault in its place.
LEG = [sys.executable, "-m", "pretrain.cli.leg"]
EXACT, AGREES, DIFFERS, NOT_JUDGED = "exact", "agrees", "differs", "not judged"
_TIMES = {"seconds", "tokens_per_second"}
# Losses of another micro-batch in float32, relative: the same sums in another order. In bfloat16
# roundings hang on the order, and grow from step to step.
_MOST_DIFFERENCE = 1e-5


@dataclass(frozen=True, slots=True)
class Check:
    """What was compared, what came of it, and how it was found."""

    verdict: str
    found: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--steps", type=int, default=10, metavar="K", help="steps of each half [10]"
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    folder = Path(arguments.run)
    if n_processes() > 1:
        raise ValueError("verify starts the processes of its legs itself: give it without torchrun")
    config = read_run_config(folder)
    steps = config.train.steps or 0
    k = min(arguments.steps, (steps - 1) // 2)
    if k < 1:
        raise ValueError(
            f"--steps is {arguments.steps} and {folder} has {steps} steps; there must be one at "
            "least in each half, and one left over"
        )
    result = prove(folder, config, k, say=output.say)
    output.say(f"verdict: {result['verdict']}, {_surroundings(result)}")
    write_json(folder / "verification.json", result)
    output.result(result)
    return 1 if result["verdict"] == DIFFERS else 0


def prove(folder: Path, config: RunConfig, k: int, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Train the legs and compare them; the verdict and all that was found. Legs that differ are
    kept."""
    say(f"{folder}: {k} + {k} steps, killed between, against {2 * k} steps, by its own settings")
    work = Path(tempfile.mkdtemp(prefix="pretrain-verify-"))
    with ExitStack() as done:
        done.callback(shutil.rmtree, work)
        straight, broken, other = (work / name for name in ("straight", "killed", "micro-batch"))
        often = replace(config.train, save_every=k, evaluate_every=k)
        asked = replace(config.evaluate, every=k)
        settings = replace(
            config, train=often, evaluate=asked, report=replace(config.report, to=())
        )
        _run(_leg(folder, straight, settings), "--stop-after", 2 * k)
        _run(_leg(folder, broken, settings), "--kill-after", k + max(1, k // 2))
        checks = {"killed": _killed(broken, k)}
        _run(broken, "--stop-after", 2 * k)
        checks |= compare(straight, broken, 2 * k)
        rows = _other_rows(config)
        if rows is None:
            checks["micro-batch"] = Check(NOT_JUDGED, "a batch is one window")
        else:
            exact = replace(often, precision="fp32")
            same = straight
            if often.precision != exact.precision:
                same = _leg(folder, work / "float32", replace(settings, train=exact))
                _run(same, "--stop-after", 2 * k)
            micro = replace(settings, train=replace(exact, micro_batch_rows=rows))
            _run(_leg(folder, other, micro), "--stop-after", 2 * k)
            checks["micro-batch"] = _close(same, other, config, rows)
        for name, check in checks.items():
            say(f"  {name:<12} {check.verdict:<10}  {check.found}")
        environment = read_environment(straight)
        environment["fingerprint"].pop("settings")
        differs = any(check.verdict == DIFFERS for check in checks.values())
        if differs:
            say(f"the legs are kept in {work}")
            done.pop_all()
    return {
        "verdict": DIFFERS if differs else EXACT,
        "steps": [k, 2 * k],
        "checks": {name: {"verdict": c.verdict, "found": c.found} for name, c in checks.items()},
        "run": environment["run"],
        "fingerprint": environment["fingerprint"],
        "machine": {key: environment.get(key) for key in ("platform", "cpu", "gpu", "python")},
    }


def _surroundings(result: Mapping[str, Any]) -> str:
    print_, machine = result["fingerprint"], result["machine"]
    return (
        f"with pretrain {print_['pretrain']} (code {print_['code']}), torch {print_['torch']}, "
        f"{print_['device']}, {print_['threads']} threads, {machine['gpu'] or machine['cpu']}"
    )


def _leg(run: Path, folder: Path, config: RunConfig) -> Path:
    """A run of the same settings that has not made a step."""
    import torch

    from pretrain.run.identity import code_hash

    folder.mkdir()
    shutil.copytree(run / "tokenizer", folder / "tokenizer")
    environment = read_environment(run)
    # What is proven holds for this code on this run's text.
    here = {"pretrain": __version__, "code": code_hash(), "torch": torch.__version__}
    environment["fingerprint"] |= {**here, "settings": settings_of(config)}
    write_json(folder / ENVIRONMENT, environment)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return folder


def _run(folder: Path, how: str, step: int) -> None:
    done = subprocess.run(
        [*LEG, str(folder), how, str(step)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    dies = how == "--kill-after"
    if done.returncode != (-signal.SIGKILL if dies else 0):
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ValueError(f"a leg ended with exit code {done.returncode}:\n{last}")


def _killed(folder: Path, k: int) -> Check:
    """That the kill landed where it was meant to."""
    from pretrain.checkpoint import list_checkpoints

    made = max((record["step"] for record in RunLog(folder).metrics()), default=0)
    saved = [path.name for path in list_checkpoints(folder / "checkpoints")]
    if saved[-1:] != [f"step-{k:08d}"] or made <= k:
        return Check(DIFFERS, f"{made} steps made, and saved were {', '.join(saved) or 'none'}")
    return Check(EXACT, f"by SIGKILL after step {made}, resumed from step {k}")


def compare(one: Path, other: Path, step: int) -> dict[str, Check]:
    """Two runs at a step, bit by bit."""
    from pretrain.checkpoint import checkpoint_name, open_checkpoint

    first, second = (
        open_checkpoint(f / "checkpoints" / checkpoint_name(step)) for f in (one, other)
    )
    return {
        "order": _same_steps(one, other, ("ids",), "what each of {} steps read"),
        "losses": _same_steps(
            one,
            other,
            ("loss", "grad_norm", "learning_rate", "bits_per_byte"),
            "losses, gradient norms and rates of {} steps",
        ),
        "evaluations": _same_lines(one, other),
        "weights": _same_tensors(first, second, "model"),
        "optimizer": _same_tensors(first, second, "optimizer"),
    }


def _same_steps(one: Path, other: Path, keys: tuple[str, ...], what: str) -> Check:
    rows = [
        [(r["step"], *(r[key] for key in keys)) for r in _steps_of(folder)]
        for folder in (one, other)
    ]
    if rows[0] == rows[1]:
        return Check(EXACT, what.format(len(rows[0])))
    pairs = zip(rows[0], rows[1], strict=False)
    first = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if first is None:
        return Check(DIFFERS, f"{len(rows[0])} steps against {len(rows[1])}")
    one_step, other_step = first
    return Check(
        DIFFERS, f"step {one_step[0]}: {', '.join(keys)} {one_step[1:]} and {other_step[1:]}"
    )


def _steps_of(folder: Path) -> list[dict[str, Any]]:
    return [record for record in RunLog(folder).metrics() if record["kind"] == "train"]


def _same_lines(one: Path, other: Path) -> Check:
    """Evaluations and samples."""
    lines = []
    for folder in (one, other):
        evaluations = [r for r in RunLog(folder).metrics() if r["kind"] != "train"]
        text = (folder / SAMPLES).read_text(encoding="utf-8") if evaluations else ""
        plain = [{k: v for k, v in r.items() if k not in _TIMES} for r in evaluations]
        lines.append((plain, text))
    if lines[0] == lines[1]:
        return Check(EXACT, f"{len(lines[0][0])} evaluations and their samples")
    return Check(DIFFERS, f"{METRICS} or {SAMPLES} of the two")


def _same_tensors(one: Checkpoint, other: Checkpoint, group: str) -> Check:
    if one.names(group) != other.names(group):
        return Check(DIFFERS, f"{len(one.names(group))} tensors against {len(other.names(group))}")
    import torch

    digest, numbers = hashlib.sha256(), 0
    for name in one.names(group):
        tensors = [c.read(f"{group}/{name}").contiguous() for c in (one, other)]
        first, second = (bytes(t.reshape(-1).view(torch.uint8).numpy().data) for t in tensors)
        if first != second or tensors[0].dtype != tensors[1].dtype:
            far = float((tensors[0].double() - tensors[1].double()).abs().max())
            return Check(DIFFERS, f"{name}: by up to {far:.3g}")
        digest.update(first)
        numbers += tensors[0].numel()
    return Check(
        EXACT,
        f"{len(one.names(group))} tensors, {numbers:,} numbers, sha256 {digest.hexdigest()[:16]}",
    )


def _other_rows(config: RunConfig) -> int | None:
    """Another micro-batch: the largest smaller one, else the smallest larger one."""
    train = config.train
    assert train.batch_tokens is not None
    assert train.micro_batch_rows is not None
    _, readers = config.parallel.resolve(config.parallel.processes).batch_shard(0)
    rows = -(-train.batch_tokens // config.model.window_tokens // readers)
    legal = [m for m in range(1, rows + 1) if rows % m == 0 and m != train.micro_batch_rows]
    smaller = [m for m in legal if m < train.micro_batch_rows]
    return max(smaller, default=min(legal, default=None))


def _close(one: Path, other: Path, config: RunConfig, rows: int) -> Check:
    losses = [[record["loss"] for record in _steps_of(folder)] for folder in (one, other)]
    furthest = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    return Check(
        AGREES if furthest <= _MOST_DIFFERENCE else DIFFERS,
        f"{rows} rows at once instead of {config.train.micro_batch_rows}, in float32: losses "
        f"differ by {furthest:.1e} at most, relative (legal {_MOST_DIFFERENCE:.0e})",
    )
