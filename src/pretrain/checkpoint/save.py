"""State -> files: written beside its final name, pushed to the disk, then renamed, so it is whole
or not there."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint.format import (
    DTYPE_NAMES,
    FORMAT,
    MANIFEST,
    VERSION,
    fsync_folder,
    manifest_hash,
    write_tensors,
)

# Room that must be left beside the checkpoint itself, for metrics and samples.
_RESERVE_BYTES = 16 << 20


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(
    folder: Path, *, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Write `folder`/step-NNNNNNNN with tensors named GROUP/NAME (a file a group) and a JSON state.

    Returns the path once everything is on the disk under its final name. Raises OSError when the
    disk is full or fails; then nothing stands under that name and older checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < 1.05 * n_bytes + _RESERVE_BYTES:
        message = f"a checkpoint of {n_bytes:,} bytes needs more than the {free:,} that are free"
        raise OSError(errno.ENOSPC, message, str(folder))
    final = folder / checkpoint_name(step)
    temporary = folder / f".{final.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        _write_into(temporary, step=step, tensors=tensors, state=state)
        if final.exists():
            # The same step saved again, after a resume from an older checkpoint: the new one
            # replaces it.
            final.rename(folder / f".{final.name}.old-{secrets.token_hex(4)}")
        temporary.rename(final)
        fsync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _remove_leftovers(folder)
    return final


def _write_into(
    folder: Path, *, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    files: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    for group in sorted({name.partition("/")[0] for name in tensors}):
        members = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(f"{group}/")}
        path = folder / f"{group}-00000.safetensors"
        files[path.name], slices = write_tensors(path, members)
        for (name, tensor), piece in zip(members.items(), slices, strict=True):
            listed[f"{group}/{name}"] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "slices": [{"file": piece.file, "offset": piece.offset, "box": piece.box}],
            }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "state": dict(state),
        "files": files,
        "tensors": listed,
    }
    content["sha256"] = manifest_hash(json.loads(json.dumps(content)))
    with open(folder / MANIFEST, "x", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)


def _remove_leftovers(folder: Path) -> None:
    """Delete what a killed save or a replaced checkpoint left behind; such names are never read."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, *, keep: int, protect: Collection[Path]) -> list[Path]:
    """Delete all but the newest `keep` checkpoints and those in `protect`; returns what was
    deleted.

    A checkpoint is renamed before it is deleted, so that no half-deleted one is ever found.
    """
    from pretrain.checkpoint.load import list_checkpoints

    kept = set(protect)
    doomed = [path for path in list_checkpoints(folder)[:-keep] if path not in kept]
    for path in doomed:
        path.rename(folder / f".{path.name}.old-{secrets.token_hex(4)}")
    _remove_leftovers(folder)
    return doomed
