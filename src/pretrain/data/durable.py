"""Files that survive a crash: a new file is on the disk itself before anybody is told of it.

Bytes or JSON come in; a folder is filled under another name and renamed when it is whole, so that
nothing half-written ever stands under the final name. Refused are files and folders that exist
already.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO


def refuse_full(folder: Path) -> None:
    """FileExistsError if `folder` is a file, or a folder that holds anything."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise FileExistsError(
            errno.EEXIST, "exists and is no folder; name another folder", str(folder)
        ) from None
    if names:
        text = f"exists and holds {len(names)} files; name another folder, or empty this one"
        raise FileExistsError(errno.EEXIST, text, str(folder))


def put_in_place(whole: Path, folder: Path) -> None:
    """Bring a folder to the disk and give it its final name, under which there may be an empty
    one; FileExistsError if that holds anything."""
    sync_tree(whole)
    refuse_full(folder)
    if folder.is_dir():
        os.rmdir(folder)
    os.rename(whole, folder)
    sync_folder(folder.parent)


def sync_tree(folder: Path) -> None:
    """Bring all files of a folder to the disk, so that a rename never names half of them."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            _sync(path, os.O_RDWR)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; where a system cannot open folders there is nothing
    to do."""
    if os.name == "posix":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any], *, escaped: bool = False) -> None:
    """Write a new JSON file to the disk itself; `escaped` can hold names that are no Unicode."""
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=escaped) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a new file to the disk itself."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, and a power loss too."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of a dead process that had our number
    write_file(temporary, content)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_and_close(file: BinaryIO) -> None:
    """Flush a file through to the disk and close it."""
    with file:
        file.flush()
        os.fsync(file.fileno())
