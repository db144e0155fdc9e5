"""One writer a run: a lock that the system lets go of when its holder dies, however it dies.

A run directory comes in; a second writer is refused with the name of the first. Readers never take
it. Where a file system has no locks, there is none, and that is said.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
from pathlib import Path
from typing import IO, Any

FILE_NAME = "run.lock"
_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}


class RunIsHeld(ValueError):
    """Another program trains in this folder."""


class RunLock:
    """A context in which this program is the only writer of a run."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._file: IO[str] | None = None
        self.warning: str | None = None
        """Why there is no lock, where the file system has none."""

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._locked()
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file.truncate(0)
        json.dump({"host": platform.node(), "pid": os.getpid(), "since": since}, file)
        file.flush()
        self._file = file
        return self

    def _locked(self) -> IO[str]:
        while True:
            file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115 - held open
            try:
                _lock(file)
            except OSError as error:
                if error.errno in _HELD:
                    holder = _read(self._path)
                    file.close()
                    raise RunIsHeld(
                        f"{self._path.parent} is being trained by process {holder.get('pid', '?')} "
                        f"on {holder.get('host', '?')}, since {holder.get('since', '?')}; wait for "
                        "it, or stop it"
                    ) from None
                self.warning = f"{self._path}: no lock is to be had here ({error.strerror})"
                return file
            # Whoever held the lock before may have deleted the file that was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
                    return file
            file.close()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._file.close()
            self._file = None


def _lock(file: IO[str]) -> None:
    if os.name == "posix":
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(1 << 20)  # a byte that nobody reads: Windows hides locked ones from readers
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
