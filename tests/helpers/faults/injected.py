"""Errors that the system gives: each call of a save fails once, in every way that it can fail.

Whatever the Nth open, mkdir, write, fsync, close, rename, unlink or rmdir returns, the save reports
an error and the older checkpoints are complete, or it reports none and the new one is there; once
the fault has ended the same step can be saved. Errors after a fsync are also combined with every
state of a power loss. Writes of fewer bytes than requested, and bytes that change on their way to
the disk, are part of this.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from faults.crash_states import N_BYTES, NEW, OLD, check_states, save_and_prune
from faults.history import KEEP, History, check_folder
from faults.recording import Disk, Recorder, recorded
from faults.table import Row, Unrecovered

_FULL = (errno.ENOSPC, errno.EDQUOT)
ERRORS = {
    "open": (errno.EIO, errno.EMFILE, errno.EROFS, *_FULL),
    "mkdir": (errno.EIO, errno.EROFS, *_FULL),
    "write": (errno.EIO, *_FULL),
    "fsync": (errno.EIO, *_FULL),
    "close": (errno.EIO, *_FULL),
    "rename": (errno.EIO, errno.EROFS, *_FULL),
    # Done but reported as failed, as by a network file system.
    "renamed": (errno.EIO, errno.ESTALE),
    "unlink": (errno.EIO, errno.EROFS),
    "rmdir": (errno.EIO, errno.EROFS),
}


class Fault:
    """Makes the Nth call of one kind fail; `landed` says whether it came to that."""

    def __init__(self, call: str, number: int, error: int) -> None:
        self.call, self.number, self.error = call, number, error
        self.landed, self._seen = False, 0

    def __call__(self, call: str, path: Path, data: bytes) -> bytes:
        self._seen += call == self.call
        if call == self.call and self._seen == self.number:
            self.landed = True
            raise OSError(self.error, os.strerror(self.error), str(path))
        return data

    def __str__(self) -> str:
        return f"{errno.errorcode[self.error]} from {self.call} number {self.number}"


class ShortWrites:
    """The system writes fewer bytes than given, as it may at any time."""

    def __init__(self, share: float) -> None:
        self.share, self.landed = share, False

    def __call__(self, call: str, path: Path, data: bytes) -> bytes:
        if call != "write" or len(data) < 2:
            return data
        self.landed = True
        return data[: max(1, int(self.share * len(data)))]

    def __str__(self) -> str:
        return f"writes take {self.share:.0%}"


class ChangedBytes:
    """One bit of the Nth write is changed on its way to the disk."""

    def __init__(self, number: int) -> None:
        self.number, self.landed, self._seen = number, False, 0

    def __call__(self, call: str, path: Path, data: bytes) -> bytes:
        self._seen += call == "write"
        if call != "write" or self._seen != self.number:
            return data
        self.landed = True
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 1
        return bytes(changed)

    def __str__(self) -> str:
        return f"write number {self.number} puts another bit on the disk"


Injection = Fault | ShortWrites | ChangedBytes


def fail_every_call(scratch: Path) -> Row:
    """All kinds, all errors, all N."""
    landed = sum(
        count_until_none(scratch, call=call, error=error)
        for call, errors in ERRORS.items()
        for error in errors
    )
    note = "each call of a save and its deletion, once with each error that it can give"
    return Row("EIO, ENOSPC, EDQUOT, EROFS, EMFILE", landed, landed, landed, note)


def count_until_none(scratch: Path, *, call: str, error: int) -> int:
    """Let the first, second, ... call of a kind fail until there are no more calls."""
    for number in itertools.count(1):
        if not survives(scratch, Fault(call, number, error)):
            return number - 1
    raise AssertionError


def short_writes(scratch: Path) -> Row:
    shares = (0.0, 0.1, 0.5, 0.9)
    landed = sum(survives(scratch, ShortWrites(share)) for share in shares)
    return Row("writes of fewer bytes than given", len(shares), landed, landed)


def changed_bytes(scratch: Path) -> Row:
    """Found by reading back what was saved."""
    for number in itertools.count(1):
        if not survives(scratch, ChangedBytes(number), verify=True):
            n = number - 1
            return Row("a bit changed on its way to the disk", n, n, n, "in each write of a save")
    raise AssertionError


@dataclass(slots=True)
class _Save:
    """A save into which a fault was injected: what it wrote on, and how it came out."""

    folder: Path
    history: History
    disk: Disk
    recorder: Recorder
    returned: int = 0
    """calls made until it returned; 0: it has not"""
    failed: bool = False


def survives(scratch: Path, injection: Injection, *, verify: bool = False) -> bool:
    """Whether the injection landed in a save; Unrecovered if that was not survived."""
    root, history = scratch / "injected", History(n_bytes=N_BYTES)
    root.mkdir()
    try:
        history.begin(root / "checkpoints", OLD)
        with recorded(injection) as recorder:
            save = _Save(root / "checkpoints", history, Disk(root), recorder)

            def saved() -> None:
                save.returned = len(recorder.operations)

            try:
                save_and_prune(save.folder, history, NEW, verify=verify, saved=saved)
            except OSError:
                save.failed = True
        if injection.landed:
            try:
                _check_outcome(save, injection, scratch)
            except Unrecovered as error:
                raise Unrecovered(f"{injection}: {error}") from None
        return injection.landed
    finally:
        shutil.rmtree(root)


def _check_outcome(save: _Save, injection: Injection, scratch: Path) -> None:
    if not save.returned and not save.failed:
        raise Unrecovered("the save neither returned nor failed")
    # Where the last call of all has failed, after the rename, a complete checkpoint is there.
    allowed = (NEW,) if save.returned else (OLD[-1], NEW)
    check_folder(save.folder, save.history, allowed=allowed, min_complete=KEEP)
    # What a disk may contain does not depend on the number of the error.
    if isinstance(injection, Fault) and (injection.call, injection.error) == ("fsync", errno.EIO):
        check_states(scratch, save.history, save.disk, save.recorder, returned=save.returned)
    if not (save.folder / f"step-{NEW:08d}").exists():
        save_and_prune(save.folder, save.history, NEW)
    check_folder(save.folder, save.history, allowed=(NEW,), min_complete=KEEP)
