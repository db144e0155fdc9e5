"""Files that survive a crash: a new file is on the disk itself before anybody is told of it.

Bytes or JSON come in; a folder is filled under another name and renamed when it is whole, so that
nothing half-written ever stands under the final name. Refused are files and folders that exist
already.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name when the block ends well and is
    removed otherwise."""
    refuse_full(folder)
    parent = Path(os.path.abspath(folder)).parent
    os.makedirs(parent, exist_ok=True)
    temporary = parent / f".{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    os.mkdir(temporary)
    try:
        yield temporary
        for path, _, _ in os.walk(temporary):
            sync_folder(Path(path))
        refuse_full(folder)
        if folder.is_dir():
            os.rmdir(folder)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; where a system cannot open folders there is nothing
    to do."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a new JSON file to the disk itself."""
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a new file to the disk itself."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_and_close(file: BinaryIO) -> None:
    """Flush a file through to the disk and close it."""
    with file:
        file.flush()
        os.fsync(file.fileno())
