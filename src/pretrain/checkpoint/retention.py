"""Which checkpoints a run keeps, and how the others are deleted.

A checkpoint is renamed before it is deleted, so that no half-deleted one is ever found.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterable
from pathlib import Path

from pretrain import fileio
from pretrain.checkpoint.load import list_checkpoints


def prune(
    folder: Path, *, keep: int, protect: Collection[Path] = (), every: int | None = None
) -> list[Path]:
    """Delete all but the newest `keep` checkpoints, those in `protect`, and those whose step is a
    multiple of `every`; returns the deleted paths."""
    old = [path for path in list_checkpoints(folder)[:-keep] if path not in protect]
    if every is not None:
        old = [path for path in old if _step_of(path) % every]
    _delete(folder, old)
    return old


def delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps: the run was rolled back, and they are not part of
    it."""
    _delete(folder, [path for path in list_checkpoints(folder) if _step_of(path) > step])


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _delete(folder: Path, paths: Iterable[Path]) -> None:
    for path in paths:
        os.rename(path, folder / f".{path.name}.old-{secrets.token_hex(4)}")
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed save or a killed deletion left behind; such names are never read."""
    leftovers = list(folder.glob(".step-*"))
    if leftovers:
        # Otherwise a power loss might undo the renaming and not the deletion: half a checkpoint
        # would be there under its final name.
        fileio.sync_folder(folder)
    for path in leftovers:
        fileio.remove_flat_folder(path)
