"""State -> files: written under a temporary name, flushed to the disk, then renamed, so that a
checkpoint is complete or not there.

`save_checkpoint` does so at once; `BackgroundSaver` copies the tensors and does the rest while
training continues. Older checkpoints are deleted only after the new one was read back and verified.
With several processes each writes its shards, and rank 0 commits when all have done so.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import fileio
from pretrain.checkpoint.format import (
    FORMAT,
    MANIFEST,
    VERSION,
    DamagedCheckpoint,
    TensorShard,
    manifest_hash,
    write_tensors,
)
from pretrain.checkpoint.load import Checkpoint, checkpoint_name, list_checkpoints, quarantine
from pretrain.distributed import World

# Space that must be left besides the checkpoint itself, for metrics and samples.
_RESERVE_BYTES = 16 << 20


def _alone() -> World:
    """The world of a process that saves by itself."""
    return World(rank=0, size=1, device=torch.device("cpu"), threads=1)


def on_each(world: World, work: Callable[[], str | None]) -> list[str]:
    """Run `work` in each process of those that save together; returns the results of all, by rank.

    If the work of one raises an OSError, all of them raise it, so that none waits for one that has
    given up.
    """
    own_error: OSError | None = None
    try:
        answer = json.dumps({"result": work() or ""})
    except OSError as error:
        own_error = error
        answer = json.dumps({"errno": error.errno, "error": str(error)})
    texts = world.all_gather_str(answer, group=world.save_group)
    if own_error is not None:
        raise own_error
    answers = [json.loads(text) for text in texts]
    for rank, other in enumerate(answers):
        if "error" in other:
            raise OSError(other["errno"], f"rank {rank}: {other['error']}")
    return [other["result"] for other in answers]


def on_main(world: World, work: Callable[[], str | None]) -> str:
    """Run `work` in rank 0; returns its result in every process."""
    return on_each(world, work if world.is_main else str)[0]


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    shards: Mapping[str, TensorShard] | None = None,
    world: World | None = None,
) -> Path:
    """Write `folder`/step-NNNNNNNN with tensors named GROUP/NAME (a file a group) and a JSON state.

    In a `world` of several processes all call it, with a shared folder, each with its own tensors;
    those in `shards` are parts of larger ones. Returns the path once everything is on the disk
    under its final name. Raises OSError in each process when the disk is full or fails in one of
    them; then older checkpoints are untouched, and either nothing has the final name, or, if only
    the last fsync failed, a complete checkpoint whose name may be lost with the power. A step is
    saved once: FileExistsError if it exists.
    """
    world = world or _alone()
    final = folder / checkpoint_name(step)
    own_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    n_bytes = sum(map(int, on_each(world, lambda: str(own_bytes))))

    def create_temporary() -> str:
        fileio.make_folder(folder)
        remove_leftovers(folder)
        if final.exists():
            raise FileExistsError(
                errno.EEXIST, "this step is already saved; delete it first", str(final)
            )
        n_files = 2 + world.size * len({name.partition("/")[0] for name in tensors})
        needed = int(1.05 * n_bytes) + _RESERVE_BYTES
        fileio.check_free_space(folder, n_bytes=needed, n_files=n_files)
        name = f".{final.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        os.mkdir(folder / name)
        return name

    temporary = folder / on_main(world, create_temporary)
    try:
        parts = on_each(
            world, lambda: json.dumps(_write_part(temporary, world.rank, tensors, shards or {}))
        )
        on_main(world, lambda: _commit(temporary, final, step, parts, state))
    except BaseException:
        if world.rank == 0:
            fileio.remove_flat_folder(temporary)
        raise
    on_main(world, lambda: fileio.sync_folder(folder))
    return final


def _write_part(
    folder: Path, rank: int, tensors: Mapping[str, Tensor], shards: Mapping[str, TensorShard]
) -> dict[str, Any]:
    """Write this process's files, one a group; returns its part of the manifest."""
    files: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for group in sorted({name.partition("/")[0] for name in tensors}):
        prefix = f"{group}/"
        path = folder / f"{group}-{rank:05d}.safetensors"
        files[path.name], records = write_tensors(
            path,
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
            {n.removeprefix(prefix): s for n, s in shards.items() if n.startswith(prefix)},
        )
        entries |= {prefix + name: record for name, record in records.items()}
    return {"files": files, "tensors": entries}


def _commit(
    temporary: Path, final: Path, step: int, parts: list[str], state: Mapping[str, Any]
) -> None:
    """Join the manifest of all processes, write it, and give the folder its name."""
    files: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for part in map(json.loads, parts):
        files |= part["files"]
        for name, entry in part["tensors"].items():
            entries.setdefault(name, {**entry, "slices": []})["slices"] += entry["slices"]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "state": dict(state),
        "files": files,
        "tensors": entries,
    }
    content["sha256"] = manifest_hash(json.loads(json.dumps(content)))
    # Last: a folder with a manifest is complete.
    with fileio.NewFile(temporary / MANIFEST) as file:
        file.write(json.dumps(content, indent=1).encode())
    fileio.sync_folder(temporary)
    _rename(temporary, final)


def _rename(temporary: Path, final: Path) -> None:
    try:
        os.rename(temporary, final)
    except OSError:
        # A network file system may rename, lose the answer, and report an error.
        if temporary.exists() or not final.exists():
            raise


def verify_saved(path: Path, world: World | None = None) -> None:
    """Read back a checkpoint that was just saved, each process its own files. OSError, and the
    checkpoint is renamed, if the disk has not kept what was written."""

    world = world or _alone()

    def read_back() -> str:
        try:
            Checkpoint(path).verify(rank=world.rank)
        except DamagedCheckpoint as error:
            return str(error)
        return ""

    errors = [text for text in on_each(world, read_back) if text]
    if errors:
        name = on_main(world, lambda: quarantine(path).name)
        raise OSError(errno.EIO, f"{errors[0]} (renamed to {name})", str(path))


class BackgroundSaver:
    """Saves while training continues: a step waits for a copy of the tensors only.

    There is one save at a time, so a save waits for the one before. An error is raised once, by the
    next call of any method. The thread hashes and writes, which does not need Python's lock; like
    the process it may die at any moment without harm to an existing checkpoint.
    """

    def __init__(self, folder: Path, world: World | None = None) -> None:
        self.folder, self._world = folder, world or _alone()
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        *,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        shards: Mapping[str, TensorShard] | None = None,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to save. `before` runs ahead of the first byte, `after` once the new checkpoint is
        verified, when older ones may be deleted; both in rank 0 alone."""
        self.wait()
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                # A GPU copies to pinned memory without interrupting its work.
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
        copies = {name: self._copies[name] for name in tensors}
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

        def work() -> None:
            world = self._world
            try:
                on_main(world, before)
                path = save_checkpoint(
                    self.folder, step=step, tensors=copies, state=state, shards=shards, world=world
                )
                verify_saved(path, world)
                on_main(world, after)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="saver", daemon=True)
        self._thread.start()

    def poll(self) -> bool:
        """Whether a save has ended by now; raises its error."""
        return self._thread is not None and not self._thread.is_alive() and self.wait()

    def wait(self) -> bool:
        """Wait until the current save has ended, and raise its error; whether there was one."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return thread is not None


# Old checkpoints: renamed before they are deleted, so that no half-deleted one is ever found ------


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
