"""Files that survive a crash or a power loss, JSON, and locks: the only writer of whole files.

Bytes or JSON come in. A new file is on the disk itself before its name is used, and a finished
folder gets its final name in one rename, so a reader finds the old version, the new version or
nothing, never a half. An existing file is rejected by all functions except `replace_file` and
`replacing`. Everything is done by single calls of the `os` module, in a known order, so that a test
can record the calls, let any of them fail, and replay what a disk may contain after a power loss.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_JSON_BYTES = 1 << 28
"""Largest JSON file that is read: a checkpoint manifest of a million tensors has about 200 MB."""
WORK = ".pretrain-work"
"""Start of the names of unfinished work within a folder that `is_fixed`."""
LAST_NAMES = {"manifest.json", "config.yaml", "config.json"}
"""Files that a prepared folder, a run or an export has; a reader looks for them first."""
NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.ENOMEM}
"""Errors after which a command may be repeated as it is, once there is space."""
# How a file system lacks fsync: CIFS before Linux 4.17, some of FUSE.
_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_not_flushed: set[int] = set()  # the devices that the user was told of


class NewFile:
    """Context manager: an unbuffered new file, which is on the disk itself when the block ends.

    FileExistsError if the name is in use. An error inside the block or in the last fsync means that
    the content is worthless: the file is closed, and deleting it is left to the caller.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self.path = path
        self._descriptor = os.open(path, flags, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; returns their number."""
        rest = memoryview(data)
        # The system may take fewer bytes than given, as it does at a limit; the next call then
        # raises the reason.
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        return len(data)

    def close(self) -> None:
        """Flush to the disk itself, then close. An fsync that failed is never repeated: the second
        one would succeed without the lost data."""
        descriptor, self._descriptor = self._descriptor, -1
        try:
            _flush(descriptor, self.path)
            if hasattr(os, "posix_fadvise"):
                # A program that verifies the file then reads the disk, not the system's cache;
                # where the file system has the call.
                with contextlib.suppress(OSError):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[NewFile]:
    """Yield a file that takes the place of `path` when the block ends without an error.

    A crash or a power loss leaves the old content or the new content; but a file that is a mount
    point cannot be replaced, and is written in its place.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of a dead process that had the same number
    try:
        with NewFile(temporary) as file:
            yield file
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            shutil.copyfile(temporary, path)
            temporary.unlink()
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a crash or a power loss leaves the old content or the new content."""
    with replacing(path) as file:
        file.write(content)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# JSON ---------------------------------------------------------------------------------------------


def write_json(
    path: Path,
    content: Mapping[str, Any],
    *,
    replace: bool = False,
    indent: int = 1,
    ascii_only: bool = False,
) -> None:
    """Write a JSON object to the disk itself: a new file, or with `replace` over an existing one.

    `ascii_only` escapes all other characters, so file names that are not Unicode can be written.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only) + "\n"
    with replacing(path) if replace else NewFile(path) as file:
        file.write(text.encode())


def check_not_pointer(file: Path) -> None:
    """ValueError for a file that only names the one that Git LFS would download; OSError if it
    cannot be read."""
    with open(file, "rb") as opened:
        start = opened.read(len(_GIT_LFS_POINTER))
    if start == _GIT_LFS_POINTER:
        raise ValueError(
            f"{file} is a pointer of Git LFS; it must be the file that it points to: run git lfs "
            "pull in its folder, or download it"
        )


def read_json(
    path: Path, *, unique: bool = True, most_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON object. ValueError naming the file if it is damaged, not an object, larger than
    `most_bytes` or, if `unique`, has a duplicate key; OSError if it cannot be read."""
    n_bytes = os.stat(path).st_size
    if n_bytes > most_bytes:
        raise ValueError(f"{path} has {n_bytes:,} bytes; it must have at most {most_bytes:,}")
    hook = unique_keys if unique else None
    try:
        content = json.loads(path.read_bytes().decode(), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its pairs; ValueError for a duplicate key, of which Python would
    silently use the last. For `json.loads(object_pairs_hook=...)`."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {duplicate!r:.60}")
    return content


def without_surrogates(text: str) -> str:
    """Replace each lone surrogate by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def nan_to_null(value: Any) -> Any:
    """Copy a JSON value with None for NaN and the infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(item) for item in value]
    return value


# Folders ------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, with their names on the disk itself."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):  # another process was faster
        os.mkdir(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder, so that a rename or a new name survives a power loss.

    Only POSIX systems can open a folder; elsewhere nothing is done.
    """
    if os.name == "posix":
        _sync(path, os.O_RDONLY)


def sync_tree(folder: Path) -> None:
    """Flush all files of a folder, so that a rename of the folder never names half of them."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            _sync(path, os.O_RDWR)
    sync_folder(folder)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        _flush(descriptor, path)
    finally:
        os.close(descriptor)


def _flush(descriptor: int, path: Path) -> None:
    """Flush a file or a folder to the disk itself; where there is no such call, warn once."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _not_flushed:
            _not_flushed.add(device)
            logging.getLogger("pretrain").warning(
                f"note: {path} cannot be flushed to its disk ({error.strerror}), so a power loss "
                "may lose what was written last"
            )


def require_empty(folder: Path) -> None:
    """FileExistsError if `folder` is a file or a folder that is not empty; unfinished work of this
    program may be in it."""
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(WORK)]
    except FileNotFoundError:
        return
    except NotADirectoryError:
        message = "exists and is not a folder; name another folder"
        raise FileExistsError(errno.EEXIST, message, str(folder)) from None
    if names:
        message = f"exists and has {len(names)} files; name another folder, or empty this one"
        raise FileExistsError(errno.EEXIST, message, str(folder))


def is_fixed(folder: Path) -> bool:
    """Whether an empty folder can be neither removed nor renamed: a mount point, as the volume of a
    container, or a folder in one that this process may not write to. To find out, rename it to a
    folder that is not empty: this fails too, for another reason, and changes nothing."""
    if not folder.is_dir():
        return False
    try:
        with tempfile.TemporaryDirectory(prefix=f"{WORK}-", dir=folder.parent) as full:
            os.mkdir(os.path.join(full, "full"))
            os.rename(folder, full)
    except OSError as error:
        fixed = {errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS}
        return error.errno in fixed or os.path.ismount(folder)
    return False


def move_into_place(finished: Path, folder: Path) -> None:
    """Flush a finished folder and rename it to its final name, which may be an empty folder;
    FileExistsError if that is not empty.

    If the folder `is_fixed`, the files are renamed into it, from a folder within it. The last one
    is that by which a reader knows that all are there.
    """
    folder = folder.resolve()
    sync_tree(finished)
    require_empty(folder)
    if is_fixed(folder):
        for path in sorted(finished.iterdir(), key=lambda path: path.name in LAST_NAMES):
            os.rename(path, folder / path.name)
        os.rmdir(finished)
        sync_folder(folder)
        return
    if folder.is_dir():
        os.rmdir(folder)
    os.rename(finished, folder)
    sync_folder(folder.parent)


def remove_flat_folder(path: Path) -> None:
    """Delete a folder of files that already has a temporary name; what cannot be deleted is left
    for the next attempt."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            os.unlink(path / name)
        os.rmdir(path)


def check_free_space(folder: Path, n_bytes: int, n_files: int, what: str = "a checkpoint") -> None:
    """OSError (ENOSPC) unless the disk of `folder` has space for `n_bytes` in `n_files` files."""
    disk = shutil.disk_usage(folder)
    counts = [(n_bytes, disk.free, disk.total, "bytes")]
    if hasattr(os, "statvfs"):
        table = os.statvfs(folder)
        counts.append((n_files, table.f_favail, table.f_files, "inodes"))
    for needed, free, total, unit in counts:
        if total and free < needed:  # some file systems do not report a size or a table: 0 of 0
            message = f"{what} needs {needed:,} {unit}, but only {free:,} are free"
            raise OSError(errno.ENOSPC, message, str(folder))


# Locks --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = False, action: str = "used") -> Iterator[str | None]:
    """Run the block as the only process that has the lock file `path`.

    The system releases the lock when its owner dies, however it dies. The file names its owner
    (host, process, time) and is deleted at the end. If another process has the lock, `wait` blocks
    until it is released; otherwise ValueError: "FOLDER is being `action` by process N". Where the
    system or the file system has no locks, the block runs without one, and the reason is yielded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    warning = None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in {errno.EAGAIN, errno.EACCES, errno.EDEADLK}:
                os.close(descriptor)
                owner: dict[str, Any] = {}
                with contextlib.suppress(OSError, ValueError):
                    owner = read_json(path)
                raise ValueError(
                    f"{path.parent} is being {action} by process {owner.get('pid', '?')} on "
                    f"{owner.get('host', '?')}, since {owner.get('since', '?')}; wait for it, or "
                    "stop it"
                ) from None
            warning = f"{path}: file locking is not available ({error.strerror})"
            break
        # The last owner may have deleted the file before this process locked it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    try:
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        owner = {"host": platform.node(), "pid": os.getpid(), "since": since}
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(owner).encode())
        yield warning
    finally:
        # Deleted while locked: afterwards the name may be that of the next owner's file.
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(descriptor)
