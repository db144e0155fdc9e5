"""State -> files: written beside its final name, pushed to the disk, then renamed, so it is whole
or not there.

`save_checkpoint` does so at once; `BackgroundSaver` copies the tensors and does the rest while
training goes on. Older checkpoints are deleted only after the new one was read back and verified.
Of several processes each writes what it holds, and the first one commits when all have done so.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import fileio
from pretrain.checkpoint.format import (
    DTYPE_NAMES,
    FORMAT,
    MANIFEST,
    VERSION,
    Place,
    manifest_hash,
    write_tensors,
)
from pretrain.checkpoint.load import DamagedCheckpoint, list_checkpoints, open_checkpoint, set_aside
from pretrain.checkpoint.together import Processes
from pretrain.distributed import World

# Room that must be left beside the checkpoint itself, for metrics and samples.
_RESERVE_BYTES = 16 << 20


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    places: Mapping[str, Place] | None = None,
    world: World | None = None,
) -> Path:
    """Write `folder`/step-NNNNNNNN with tensors named GROUP/NAME (a file a group) and a JSON state.

    In a `world` of several processes all call it, in a folder that they share, each with what it
    holds: of a tensor in `places` it is a box. Returns the path once everything is on the disk
    under its final name. Raises OSError when the disk is full or fails, for each process if it did
    for one; then older checkpoints are untouched, and nothing stands under that name, or, where
    only the last fsync has failed, a whole checkpoint whose name a power loss may take. A step is
    saved once: FileExistsError where it is there already.
    """
    here = Processes(world)
    final, places = folder / checkpoint_name(step), places or {}
    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    n_bytes = sum(json.loads(text) for text in here.gather(json.dumps(n_bytes)))

    def begin() -> str:
        fileio.make_folder(folder)
        _remove_leftovers(folder)
        if final.exists():
            raise FileExistsError(errno.EEXIST, "this step was saved before", str(final))
        n_files = 2 + here.size * len({name.partition("/")[0] for name in tensors})
        room = int(1.05 * n_bytes) + _RESERVE_BYTES
        fileio.check_free_space(folder, n_bytes=room, n_files=n_files)
        name = f".{final.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        os.mkdir(folder / name)
        return name

    temporary = folder / here.first(begin)
    try:
        written = here.each(lambda: json.dumps(_write_part(temporary, here.rank, tensors, places)))
        here.first(lambda: _commit(temporary, final, step, written, state))
    except BaseException:
        if here.rank == 0:
            fileio.remove_flat_folder(temporary)
        raise
    here.first(lambda: fileio.sync_folder(folder))
    return final


def _rename(temporary: Path, final: Path) -> None:
    try:
        os.rename(temporary, final)
    except OSError:
        # A network file system may do a thing, lose the answer, and say that it failed.
        if temporary.exists() or not final.exists():
            raise


def _write_part(
    folder: Path, rank: int, tensors: Mapping[str, Tensor], places: Mapping[str, Place]
) -> dict[str, Any]:
    """Write this process's files, one a group; returns what the manifest says of them."""
    files: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    boxes = {name: place.box for name, place in places.items()}
    for group in sorted({name.partition("/")[0] for name in tensors}):
        members = {n: t for n, t in tensors.items() if n.startswith(f"{group}/")}
        path = folder / f"{group}-{rank:05d}.safetensors"
        inside = {n.partition("/")[2]: t for n, t in members.items()}
        inside_boxes = {n.partition("/")[2]: boxes[n] for n in members if n in boxes}
        files[path.name], slices = write_tensors(path, inside, inside_boxes)
        for (name, tensor), piece in zip(members.items(), slices, strict=True):
            shape = places[name].shape if name in places else tuple(tensor.shape)
            listed[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(shape),
                "slices": [{"file": piece.file, "offset": piece.offset, "box": piece.box}],
            }
    return {"files": files, "tensors": listed}


def _commit(
    temporary: Path, final: Path, step: int, written: list[str], state: Mapping[str, Any]
) -> None:
    """Put together what all processes wrote, and give it its name."""
    files: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    for part in map(json.loads, written):
        files |= part["files"]
        for name, entry in part["tensors"].items():
            listed.setdefault(name, {**entry, "slices": []})["slices"] += entry["slices"]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "state": dict(state),
        "files": files,
        "tensors": listed,
    }
    content["sha256"] = manifest_hash(json.loads(json.dumps(content)))
    # Last: a folder with a manifest is whole.
    fileio.write_file(temporary / MANIFEST, json.dumps(content, indent=1).encode())
    fileio.sync_folder(temporary)
    _rename(temporary, final)


def _remove_leftovers(folder: Path) -> None:
    """Delete what a killed save or a killed deletion left behind; such names are never read."""
    leftovers = list(folder.glob(".step-*"))
    if leftovers:
        # Else a power loss may take back the renaming and not the deletion: half a checkpoint would
        # stand under its final name.
        fileio.sync_folder(folder)
    for path in leftovers:
        fileio.remove_flat_folder(path)


def prune(
    folder: Path, *, keep: int, protect: Collection[Path] = (), every: int | None = None
) -> list[Path]:
    """Delete all but the newest `keep` checkpoints, those in `protect`, and those of every so many
    steps; returns what was deleted.

    A checkpoint is renamed before it is deleted, so that no half-deleted one is ever found.
    """
    kept = set(protect)
    doomed = [path for path in list_checkpoints(folder)[:-keep] if path not in kept]
    if every is not None:
        doomed = [path for path in doomed if int(path.name.removeprefix("step-")) % every]
    for path in doomed:
        os.rename(path, folder / f".{path.name}.old-{secrets.token_hex(4)}")
    _remove_leftovers(folder)
    return doomed


def forget_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps: the run has gone back, and they are no part of it."""
    for path in list_checkpoints(folder):
        if int(path.name.removeprefix("step-")) > step:
            os.rename(path, folder / f".{path.name}.old-{secrets.token_hex(4)}")
    _remove_leftovers(folder)


def verify_saved(path: Path, world: World | None = None) -> None:
    """Read back a checkpoint that was just saved, each process what it wrote; OSError, and it is
    set aside, if the disk has not kept what it was given."""
    here = Processes(world)

    def read_back() -> str:
        try:
            open_checkpoint(path).verify(rank=here.rank)
        except DamagedCheckpoint as error:
            return str(error)
        return ""

    complaints = [text for text in here.each(read_back) if text]
    if complaints:
        aside = here.first(lambda: set_aside(path).name)
        raise OSError(errno.EIO, f"{complaints[0]} (set aside as {aside})", str(path))


class BackgroundSaver:
    """Saves while training goes on: a step waits for a copy of the tensors only.

    One save at a time, so the next one waits for the one before. What failed is raised by the next
    call of any method, once. The thread hashes and writes, for which Python's lock is not needed;
    like the process it may die at any moment, and costs no checkpoint that was there.
    """

    def __init__(self, folder: Path, world: World | None = None) -> None:
        self.folder, self._world = folder, world
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        *,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        places: Mapping[str, Place] | None = None,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to save. `before` runs ahead of the first byte, `after` once the new checkpoint is
        verified: the time to forget older ones; both in the first process alone."""
        self.wait()
        copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

        def work() -> None:
            here, world = Processes(self._world), self._world
            try:
                here.first(before)
                path = save_checkpoint(
                    self.folder,
                    step=step,
                    tensors=copies,
                    state=state,
                    places=places,
                    world=world,
                )
                verify_saved(path, world)
                here.first(after)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="saver", daemon=True)
        self._thread.start()

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        kept = self._copies.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            # From pinned memory a GPU copies beside its work.
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name] = kept
        return kept.copy_(tensor.detach(), non_blocking=True)

    def poll(self) -> bool:
        """Whether a save has come to its end by now; raises what went wrong with it."""
        return self._thread is not None and not self._thread.is_alive() and self.wait()

    def wait(self) -> bool:
        """Wait for the end of the save at hand, and raise what went wrong; whether there was
        one."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return thread is not None
