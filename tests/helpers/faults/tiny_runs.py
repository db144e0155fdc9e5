"""Small runs of the real `pretrain train`, each in a child, and what must be equal in two of them.

Everything is the program's own: command line, prepared text, loop, optimizer, saver, records. Only
the sizes are small: 2 layers, 32 wide, 256 tokens a step.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults.zygote import exit_code, fork, side_by_side
from pretrain.checkpoint.load import Checkpoint, list_checkpoints
from pretrain.cli import main
from pretrain.corpus.reading import read_documents
from pretrain.train import eval_hooks
from tiny import TINY

# Saves, evaluations and their coincidence all occur, and the last save is not the best one's.
STEPS, EVALUATE_EVERY, SAVE_EVERY = 12, 4, 3
OFTEN = f"--train.evaluate_every {EVALUATE_EVERY} --train.save_every {SAVE_EVERY}".split()
_TIMES = {"seconds", "tokens_per_second", "train_seconds", "total_seconds", "stalled_seconds"}
_TIMES |= {"peak_memory_bytes"}


def prepare(scratch: Path) -> Path:
    """A text of 30 short real documents, prepared in a child; everything that a run imports is then
    imported here, so that each later child is quick."""
    os.environ["PRETRAIN_CACHE"] = str(scratch / "cache")
    eval_hooks.SAMPLE_TOKENS = 8  # a sample is most of what an evaluation of so small a model costs
    text = scratch / "text.jsonl"
    documents = list(read_documents("bundled"))[::12][:30]
    text.write_text("".join(json.dumps({"text": d.text[:800]}) + "\n" for d in documents))

    def first_run() -> list[str]:
        train(text, scratch / "first", "--train.steps", "2", *OFTEN)
        return sorted(sys.modules)

    for name in side_by_side([first_run])[0]:
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # a module that only its parent can import
                importlib.import_module(name)
    return text


def train(text: Path, run: Path, *args: str) -> int:
    """Start a run in this process; returns the exit code."""
    return quietly(["train", str(text), "--run", str(run), *TINY, *args], run)


def resume(run: Path) -> int:
    return quietly(["train", "--resume", "--run", str(run)], run)


def quietly(args: Sequence[str], run: Path) -> int:
    """Run one command; its output goes to a file next to the run."""
    with (
        open(run.with_name(run.name + ".output"), "a", encoding="utf-8") as output_of,
        contextlib.redirect_stdout(output_of),
        contextlib.redirect_stderr(output_of),
    ):
        return main(args)


def output_of(run: Path) -> str:
    return run.with_name(run.name + ".output").read_text(encoding="utf-8")


def in_child(work: Callable[[], object]) -> int:
    return exit_code(fork(work))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records of a run without times."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [_timeless(json.loads(line)) for line in lines]


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _TIMES}


def run_hashes(run: Path) -> dict[str, str]:
    """A checksum of each thing that must be equal in a run that was interrupted: every weight and
    number of the optimizer in the last checkpoint, where it stands in the data, every line of the
    records, and the summary."""
    newest = Checkpoint(list_checkpoints(run / "checkpoints")[-1])
    newest.verify()
    tensors = hashlib.sha256()
    for group in ("model", "optimizer"):
        for name in newest.names(group):
            tensor = newest.read(f"{group}/{name}")
            tensors.update(f"{group}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            tensors.update(tensor.numpy().tobytes())
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    # Durations: of a table of counts, or of xz.
    summary.pop("baselines")
    return {
        "tensors": tensors.hexdigest(),
        "step": str(newest.step),
        "position": str(newest.state["position"]),
        "metrics": _checksum(lines_of(run / "metrics.jsonl")),
        "samples": _checksum(lines_of(run / "samples.jsonl")),
        "summary": _checksum(_timeless(summary)),
        "report": str((run / "report.html").is_file()),
        "checkpoints": " ".join(path.name for path in list_checkpoints(run / "checkpoints")),
    }


def _checksum(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
