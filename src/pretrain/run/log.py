"""The log of a run: the only reader and writer of metrics.jsonl, samples.jsonl and clock.jsonl.

They have a JSON object per line. The first two are truncated when a run is resumed, so that they
are those of an uninterrupted run, except for times; a copy keeps all lines. The decisions in
clock.jsonl stay, for the steps that are made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.fileio import nan_to_null, replace_file, sync_folder
from pretrain.run.directory import CLOCK, METRICS, SAMPLES, cannot_save_on_error, unused_name

METRICS_KEYS: Mapping[str, Mapping[str, str]] = {
    "train": {
        "step": "number of the step, from 1",
        "tokens": "targets of all steps so far",
        "loss": "nats per target of the step's batch, before the update; null if not finite",
        "bits_per_byte": "the same per byte of text behind the targets, in bits",
        "learning_rate": "of the step",
        "grad_norm": "norm of the gradient before clipping",
        "ids": "sum of the CRC-32 of the windows that were read: equal batches have equal sums",
        "tokens_per_second": "of the step, without evaluations and checkpoints",
        "seconds": "in training steps so far",
        "epoch": "passes over the training text so far",
        "sources": "tokens of each source so far, where there are several",
        "finding": "spike or not finite, where the step was an anomaly",
        "z_score": "standard deviations of an anomalous loss above the trend",
    },
    "evaluate": {
        "step": "the last step before the evaluation",
        "tokens": "targets of all steps so far",
        "val_nats_per_token": "held-out loss",
        "val_perplexity": "exp of it",
        "val_bits_per_byte": "held-out loss in bits per byte of text",
        "val_tokens": "number of held-out targets, always the same ones",
        "nats_of_halves": "sum of held-out nats in each half of the windows",
        "base_bits_per_byte": "held-out loss of the larger text that the run stands on (data.base)",
        "seconds": "in training steps so far",
    },
    "task": {
        "step": "the last step before the evaluation",
        "task": "name of the in-loop task",
        "metric": "name of its metric",
        "value": "of the metric",
        "stderr": "its standard error; null for one example",
        "examples": "number of examples",
        "chance": "value of a random guess; null where nothing is chosen",
        "seconds": "that the evaluation took",
    },
    "rollback": {
        "step": "the step that the run went back to",
        "batches": "number of batches of data that were skipped",
    },
}
"""The keys of a line of metrics.jsonl, by the value of its key `kind`."""
TIMES = frozenset({"seconds", "tokens_per_second"})
"""Keys that differ between equal runs: `pretrain verify` compares all others."""
CHARTS: Mapping[str, tuple[str, str]] = {
    "learning_rate": ("Learning rate", "by step"),
    "tokens_per_second": ("Throughput", "tokens per second"),
    "grad_norm": ("Gradient norm", "before clipping"),
}
"""Metrics of a step that the report draws: title and unit."""

SAMPLES_KEYS: Mapping[str, str] = {
    "step": "the last step before the sample",
    "prompt": "text that was continued",
    "text": "text of the model",
    "temperature": "of sampling",
    "seed": "of sampling",
}


@dataclass(frozen=True, slots=True)
class RunLog:
    """The log of one run directory; on ranks that do not write, a copy of rank 0's metrics in
    memory, without the training steps since the copy was made."""

    folder: Path
    writes: bool = True
    _copy: list[dict[str, Any]] = field(default_factory=list)
    _hashes: dict[str, Any] = field(default_factory=dict)
    """the SHA-256 of each file so far, once it was needed"""

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl, with the keys of METRICS_KEYS."""
        if not self.writes and record["kind"] != "train":
            self._copy.append(nan_to_null(record))
        self._append(METRICS, record)

    def append_sample(self, record: Mapping[str, Any]) -> None:
        """Add a line to samples.jsonl, with the keys of SAMPLES_KEYS."""
        self._append(SAMPLES, record)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        path = self.folder / name
        line = (json.dumps(nan_to_null(record), ensure_ascii=False) + "\n").encode()
        with cannot_save_on_error(path), open(path, "ab") as file:
            file.write(line)
        if name in self._hashes:
            self._hashes[name].update(line)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        if not self.writes:
            return self._copy
        return [record for record, _ in read_lines(self.folder / METRICS) if "kind" in record]

    def append_decision(self, record: Mapping[str, Any]) -> None:
        """Add a line to clock.jsonl, on the disk itself: the next step depends on it."""
        path = self.folder / CLOCK
        if self.writes:
            lines = [text for _, text in read_lines(path)]  # without one that a crash has cut
            with cannot_save_on_error(path):
                replace_file(path, "".join([*lines, json.dumps(record) + "\n"]).encode())
            self._hashes.pop(CLOCK, None)

    def decisions(self) -> list[dict[str, Any]]:
        """The lines of clock.jsonl."""
        return [record for record, _ in read_lines(self.folder / CLOCK)]

    def copy_from_main(self, broadcast: Callable[[str], str]) -> None:
        """Copy the metrics of rank 0 to the other ranks; `broadcast` returns the text of rank 0."""
        records = json.loads(broadcast(json.dumps(self.metrics() if self.writes else [])))
        if not self.writes:
            self._copy[:] = records

    def removed(self) -> list[list[dict[str, Any]]]:
        """The lines that follow those of metrics.jsonl, of each copy that `truncate` left."""
        path = self.folder / METRICS
        kept = path.read_bytes() if path.exists() else b""
        copies = [copy.read_bytes() for copy in sorted(self.folder.glob(f"{METRICS}.cut-*"))]
        tails = [copy[len(kept) :].split(b"\n") for copy in copies if copy.startswith(kept)]
        parsed = [[parse_line(line) or {} for line in tail] for tail in tails]
        return [[record for record in tail if "kind" in record] for tail in parsed]

    def truncate(self, step: int) -> None:
        """Remove the lines after step `step`; the full file is copied to NAME.cut-1, ..."""
        if not self.writes:
            self._copy[:] = [record for record in self._copy if record["step"] <= step]
            return
        for name in (METRICS, SAMPLES):
            path = self.folder / name
            kept = [text for record, text in read_lines(path) if record["step"] <= step]
            content = "".join(kept).encode()
            if path.exists() and content != path.read_bytes():
                # A copy, not a rename: there is never a moment without the file.
                shutil.copyfile(path, unused_name(path, suffix=".cut-"))
                replace_file(path, content)
                self._hashes.pop(name, None)

    def sync(self) -> None:
        """Flush lines and names to the disk itself, before a checkpoint that depends on them."""
        for name in (METRICS, SAMPLES):
            if (self.folder / name).exists():
                with open(self.folder / name, "rb") as file:
                    os.fsync(file.fileno())
        # samples.jsonl may be newer than the last time that the folder was flushed.
        sync_folder(self.folder)

    def hashes(self) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of each file now, for a checkpoint."""
        result = {}
        for name in (METRICS, SAMPLES, *([CLOCK] if self.decisions() else [])):
            path = self.folder / name
            if name not in self._hashes:
                content = path.read_bytes() if path.exists() else b""
                self._hashes[name] = hashlib.sha256(content)
            size = path.stat().st_size if path.exists() else 0
            result[name] = (size, self._hashes[name].hexdigest())
        return result

    def hash_of_start(self, name: str, n_bytes: int) -> str:
        """The SHA-256 of the first `n_bytes` of a file, or of all of it if it is shorter."""
        path = self.folder / name
        content = path.read_bytes()[:n_bytes] if path.exists() else b""
        return hashlib.sha256(content).hexdigest()


def parse_line(text: str | bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is damaged, as the last line after a crash."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    """The records of a log with their text, without damaged lines."""
    if not path.exists():
        return []
    lines = []
    # Lines end with "\n" only: samples may contain any other character that ends a line in Unicode.
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for text in file:
            record = parse_line(text) if text.endswith("\n") else None
            if record is not None and type(record.get("step")) is int:
                lines.append((record, text))
    return lines


@dataclass(slots=True)
class BestEvaluation:
    """The best evaluation so far, and the number of evaluations since: a function of the log."""

    step: int | None = None
    nats_per_token: float = math.inf
    n_evaluations_since: int = 0
    last_step: int | None = None
    """the step of the last evaluation, the best or not"""

    def update(self, step: int, nats_per_token: float) -> bool:
        """Take in an evaluation; True if it is a new best."""
        self.last_step = step
        if nats_per_token < self.nats_per_token:
            self.step = step
            self.nats_per_token = nats_per_token
            self.n_evaluations_since = 0
            return True
        self.n_evaluations_since += 1
        return False

    @staticmethod
    def from_log(records: Iterable[Mapping[str, Any]]) -> BestEvaluation:
        """The best of the evaluations in metrics.jsonl."""
        best = BestEvaluation()
        for record in records:
            if record["kind"] == "evaluate":
                nats = record["val_nats_per_token"]  # null if it was not finite
                best.update(record["step"], math.nan if nats is None else nats)
        return best


def nats_of_choice(records: Iterable[Mapping[str, Any]]) -> float:
    """Return the nats by which the best of several evaluations looks better than it is, because it
    was chosen by the text that it is scored on: what is missing to the score in which each half of
    that text has the step that is best on the other. 0 where all three are the same step."""
    halves = [r["nats_of_halves"] for r in records if "nats_of_halves" in r]
    pairs = [(a, b) for a, b in halves if a and b]  # null: not finite; 0: an empty half
    if not pairs:
        return 0.0
    best_a, best_b = min(pairs), min(pairs, key=lambda pair: pair[1])
    return float(best_b[0] + best_a[1] - min(a + b for a, b in pairs))


def choice(nats: float, bits_per_byte: float) -> dict[str, Any]:
    """Return what summary.json says of the `nats_of_choice` that its number has more than the
    checkpoints themselves, which have `bits_per_byte`."""
    note = (
        f"the checkpoint was chosen by evaluations of this text, on which it has "
        f"{bits_per_byte:.4f} bits/byte; chosen by one half of them and scored on the other it "
        "has the number above"
    )
    return {"nats": nats, "bits_per_byte": bits_per_byte, "note": note}
