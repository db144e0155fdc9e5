"""A file about a step that went wrong: what it read, how large each gradient was, and what came
before.

It is written while the step's gradients still exist, into the folder `post-mortem` of the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pretrain.data import PreparedData
from pretrain.data.trace import Tracer
from pretrain.train.batches import TrainingBatches
from pretrain.train.records import write_json
from pretrain.train.watch import Finding

FOLDER = "post-mortem"
_LAST_STEPS = 200
# A run that goes wrong at every step would fill the disk with the same story.
_MOST_FILES = 20


def write_post_mortem(
    run_folder: Path,
    *,
    step: int,
    finding: Finding,
    loss: float,
    grad_norm: float,
    clip: float,
    gradient_norms: Mapping[str, float],
    data: PreparedData,
    batches: TrainingBatches,
    records: Iterable[Mapping[str, Any]],
) -> Path | None:
    """Write what is known of step `step` (from 0); None if the run has enough of such files."""
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.json"
    if path.exists() or len(list(folder.iterdir())) >= _MOST_FILES:
        return None
    recent = [record for record in records if record["kind"] == "train"][-_LAST_STEPS:]
    content = {
        "step": step,
        "finding": finding.kind,
        "z_score": finding.z_score,
        "loss": loss,
        "grad_norm": grad_norm,
        # Gradients have been clipped by now.
        "gradient_norms": _scaled(gradient_norms, _clipped_by(clip, grad_norm)),
        "documents": _documents(step, data, batches),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "last_steps": [
            {k: record.get(k) for k in ("step", "loss", "grad_norm", "learning_rate")}
            for record in recent
        ],
    }
    write_json(path, content)
    return path


def _clipped_by(clip: float, norm: float) -> float:
    """What gradients have been divided by: those of a norm that is not finite are left alone."""
    return max(1.0, norm / clip) if clip and math.isfinite(norm) else 1.0


def _scaled(norms: Mapping[str, float], factor: float) -> dict[str, float | None]:
    """Norms as they were before clipping; None where one is not finite."""
    return {n: norm * factor if math.isfinite(norm) else None for n, norm in norms.items()}


def _documents(step: int, data: PreparedData, batches: TrainingBatches) -> list[dict[str, Any]]:
    """What the step read: id and file of each document, and which of its tokens."""
    stream = data.split("train")
    tracer = Tracer(batches.order, stream.document_offsets, batches.batch_size, batches.rollbacks)
    sights = tracer.occurrences_in(step + 1)
    numbers = {sight.document for sight in sights}
    origins = dict(stream.origins(lambda number, _: number in numbers))
    return [
        {
            "sample": sight.sample,
            "id": origins[sight.document].id,
            "file": origins[sight.document].file,
            "first_token": sight.first_token,
            "stop_token": sight.stop_token,
        }
        for sight in sights
    ]
