"""Twelve broken savers. Each is the real one with one small edit that somebody could make in good
faith; a suite that does not catch all of them proves nothing about the real one.

Each edit is a context in which modules of `pretrain` are changed. The deterministic parts are run
in order; the first that raises Unrecovered has caught it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from faults.crash_states import N_BYTES, NEW, OLD, enumerate_states, save_and_prune
from faults.history import KEEP, History, check_folder
from faults.injected import changed_bytes, fail_every_call, short_writes
from faults.table import Row, Unrecovered
from pretrain import fileio
from pretrain.checkpoint import save as save_module
from pretrain.checkpoint.format import BLOCK_BYTES, MANIFEST, HashingFile
from pretrain.checkpoint.load import list_checkpoints

PARTS: dict[str, Callable[[Path], Row]] = {
    "crash states": enumerate_states,
    "short writes": short_writes,
    "changed bytes": changed_bytes,
    "failing calls": fail_every_call,
}
Edit = AbstractContextManager[object]


def _in_file(**methods: Callable[..., Any]) -> Edit:
    return _both(*(mock.patch.object(fileio.NewFile, n, new) for n, new in methods.items()))


def no_flush() -> Edit:
    """Bytes are buffered, and the fsync comes before they are written."""

    def write(self: Any, part: memoryview) -> None:
        self.waiting = getattr(self, "waiting", b"") + bytes(part)

    def close(self: Any) -> None:
        os.fsync(self._descriptor)
        os.write(self._descriptor, getattr(self, "waiting", b""))
        os.close(self._descriptor)

    return _in_file(write=write, close=close)


def no_fsync_of_files() -> Edit:
    """A file is closed without an fsync."""

    def close(self: Any) -> None:
        os.close(self._descriptor)

    return _in_file(close=close)


def no_fsync_of_folders() -> Edit:
    """Folders are not fsynced, so names and renames may be lost."""
    return mock.patch.object(fileio, "sync_folder", return_value=None)


def manifest_first() -> Edit:
    """Files are moved to the final folder one by one, the manifest first."""

    def rename(temporary: Path, final: Path) -> None:
        os.mkdir(final)
        for path in sorted(temporary.iterdir(), key=lambda p: p.name != MANIFEST):
            os.rename(path, final / path.name)
        os.rmdir(temporary)
        fileio.sync_folder(final)

    return mock.patch.object(save_module, "_rename", rename)


def unlink_then_rename() -> Edit:
    """The older checkpoint is deleted before the rename, as with one fixed name."""
    real = save_module._rename

    def rename(temporary: Path, final: Path) -> None:
        for old in list_checkpoints(final.parent)[:-1]:
            fileio.remove_flat_folder(old)
        real(temporary, final)

    return mock.patch.object(save_module, "_rename", rename)


def in_place() -> Edit:
    """Files are written under the final name."""
    real_part, real_commit = save_module._write_part, save_module._commit

    def write_part(folder: Path, *given: Any) -> dict[str, Any]:
        final = folder.with_name(folder.name.partition(".tmp-")[0].removeprefix("."))
        os.rename(folder, final)
        return real_part(final, *given)

    def commit(temporary: Path, final: Path, *given: Any) -> None:
        real_commit(final, final, *given)

    return _both(
        mock.patch.object(save_module, "_write_part", write_part),
        mock.patch.object(save_module, "_commit", commit),
        mock.patch.object(save_module, "_rename"),
    )


def hash_of_the_wrong_bytes() -> Edit:
    """A file is hashed by reading it back, so any content counts as right."""
    real = HashingFile.close

    def close(self: Any) -> None:
        real(self)
        content = self.path.read_bytes()
        starts = range(0, len(content), BLOCK_BYTES)
        blocks = [content[start : start + BLOCK_BYTES] for start in starts]
        self.hashes = [hashlib.sha256(block).hexdigest() for block in blocks]

    return mock.patch.object(HashingFile, "close", close)


def order_by_time() -> Edit:
    """Checkpoints are sorted by time stamp."""

    def by_time(folder: Path) -> list[Path]:
        return sorted(list_checkpoints(folder), key=lambda path: path.stat().st_mtime)

    return mock.patch.object(save_module, "list_checkpoints", by_time)


def deletes_the_old_one_first() -> Edit:
    """Older checkpoints are deleted before the new one is written."""
    real = save_module.save_checkpoint

    def save(folder: Path, **content: Any) -> Path:
        save_module.prune(folder, keep=1)
        return real(folder, **content)

    return mock.patch.object(save_module, "save_checkpoint", save)


def swallows_a_full_disk() -> Edit:
    """Errors of writing are ignored."""
    real = fileio.NewFile.write

    def write(self: Any, part: memoryview) -> None:
        with contextlib.suppress(OSError):
            real(self, part)

    return _in_file(write=write)


def tries_fsync_again() -> Edit:
    """An fsync that failed is repeated; it succeeds, and the bytes are lost."""

    def close(self: Any) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError:
            os.fsync(self._descriptor)
        os.close(self._descriptor)

    return _in_file(close=close)


def no_barrier() -> Edit:
    """The rename does not wait for the fsync of the files."""
    real = save_module._rename
    late: list[Callable[[], None]] = []
    close = fileio.NewFile.close

    def close_later(self: Any) -> None:
        late.append(lambda: close(self))

    def rename(temporary: Path, final: Path) -> None:
        real(temporary, final)
        while late:
            late.pop()()

    return _both(_in_file(close=close_later), mock.patch.object(save_module, "_rename", rename))


@contextmanager
def _both(*edits: Edit) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit)
        yield


BROKEN: tuple[Callable[[], Edit], ...] = (
    no_flush,
    no_fsync_of_files,
    no_fsync_of_folders,
    manifest_first,
    unlink_then_rename,
    in_place,
    hash_of_the_wrong_bytes,
    order_by_time,
    deletes_the_old_one_first,
    swallows_a_full_disk,
    tries_fsync_again,
    no_barrier,
)


def caught_by(scratch: Path, edit: Callable[[], Edit]) -> tuple[str, str] | None:
    """The part that catches a broken saver, and its message; None if no part does."""
    for name, part in PARTS.items():
        place = scratch / "broken"
        place.mkdir()
        try:
            with edit():
                part(place)
        except Unrecovered as error:
            return name, str(error)
        finally:
            shutil.rmtree(place)
    return None


def check_without_faults(scratch: Path, edit: Callable[[], Edit]) -> None:
    """Check that the broken saver can save when no fault happens."""
    history, folder = History(n_bytes=N_BYTES), scratch / "plain"
    with edit():
        for step in (*OLD, NEW):
            save_and_prune(folder, history, step)
    check_folder(folder, history, allowed=(NEW,), min_complete=KEEP)
    shutil.rmtree(folder)


def catch_all(scratch: Path, broken: Collection[Callable[[], Edit]] = BROKEN) -> list[Row]:
    """A row for each broken saver; `survived` is 1 if it was caught."""
    rows = []
    for edit in broken:
        check_without_faults(scratch, edit)
        caught = caught_by(scratch, edit)
        by = "by no part" if caught is None else f"by {caught[0]}"
        name = edit.__name__.replace("_", " ")
        rows.append(Row(f"broken saver: {name}", 1, 1, int(caught is not None), f"caught {by}"))
    return rows
