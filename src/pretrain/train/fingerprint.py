"""What a run's numbers hang on besides its config: data, tokenizer, computing code, versions,
threads.

It is written into every checkpoint, with the settings. A resume under another one would silently
be another run: `changes` finds the differences, and they are refused or accepted by name.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pretrain import __version__
from pretrain.checkpoint import Checkpoint
from pretrain.data import PreparedData
from pretrain.distributed import World

# The rooms whose code decides what a step computes.
_COMPUTING_ROOMS = ("data", "model", "optimizer", "parallel", "train")


@cache
def code_hash() -> str:
    """One hash over the source of the rooms that compute."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for room in _COMPUTING_ROOMS:
        for path in sorted((package / room).glob("*.py")):
            digest.update(f"{room}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def fingerprint(
    data: PreparedData, world: World, first_weights: Checkpoint | None
) -> dict[str, Any]:
    start = {} if first_weights is None else {"first weights": first_weights.sha256}
    return {
        **start,
        "training text": data.split("train").sha256,
        "held-out text": data.split("val").sha256,
        "tokenizer": data.manifest.tokenizer_sha256,
        "pretrain": __version__,
        "code": code_hash(),
        "torch": torch.__version__,
        "device": world.device.type,
        "threads": world.threads,
    }
