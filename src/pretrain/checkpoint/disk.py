"""The few operations on the disk that a save is made of, each by one call of the system.

Every byte and every name of a checkpoint goes through here, unbuffered and in a known order, so
that a test may record the calls, break any of them, and replay what a disk would hold after a power
loss. An error means that the file at hand is worthless: nothing is tried again on it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path

BLOCK_BYTES = 4 << 20


class HashingFile:
    """Writes a new file and hashes its blocks on the way; nothing is read back."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._path, self._descriptor = path, os.open(path, flags, 0o644)
        self._block, self._filled, self.bytes = hashlib.sha256(), 0, 0
        self.hashes: list[str] = []

    def write(self, data: memoryview) -> None:
        start = 0
        while start < len(data):
            part = data[start : start + BLOCK_BYTES - self._filled]
            self._write_whole(part)
            self._block.update(part)
            self._filled += len(part)
            start += len(part)
            if self._filled == BLOCK_BYTES:
                self._end_block()
        self.bytes += len(data)

    def _write_whole(self, part: memoryview) -> None:
        # The system may take less than it was given, as it does at a limit; the next call then says
        # why.
        while part:
            part = part[os.write(self._descriptor, part) :]

    def _end_block(self) -> None:
        self.hashes.append(self._block.hexdigest())
        self._block, self._filled = hashlib.sha256(), 0

    def close(self) -> None:
        """Push everything to the disk itself; an error here means that the file is worthless."""
        if self._filled:
            self._end_block()
        descriptor, self._descriptor = self._descriptor, -1
        try:
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                # So that who verifies the file reads the disk, not this program's memory of it.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def abandon(self) -> None:
        """Let go of a file that could not be written; what is there of it is deleted elsewhere."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file to the disk itself."""
    file = HashingFile(path)
    try:
        file.write(memoryview(content))
        file.close()
    except BaseException:
        file.abandon()
        raise


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, and bring their names to the disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):  # another writer was quicker
        os.mkdir(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a rename or a new name in a folder survive a power loss (POSIX; elsewhere there is no
    such call)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Delete a folder of files whose name says already that it is to be deleted; what cannot be
    deleted stays for the next time."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            os.unlink(path / name)
        os.rmdir(path)


def refuse_little_room(folder: Path, *, n_bytes: int, n_files: int) -> None:
    """OSError (ENOSPC) unless the disk of `folder` has room for so much and for as many files."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        message = f"a checkpoint needs {n_bytes:,} bytes, and {free:,} are free"
        raise OSError(errno.ENOSPC, message, str(folder))
    if hasattr(os, "statvfs"):
        there = os.statvfs(folder)
        # Some file systems have no table of files, and say 0 of 0.
        if there.f_files and there.f_favail < n_files:
            message = f"a checkpoint needs {n_files} files, and {there.f_favail} more can be made"
            raise OSError(errno.ENOSPC, message, str(folder))
