"""The folder that `--out` asks for: filled under a name of its own beside the final one, then
renamed.

Symbolic links are followed. A folder that holds anything is refused, and so is the one that the
command runs in. Only what this process made is ever removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from pretrain.fileio import move_into_place, require_empty


def resolve_out(given: str) -> Path:
    """Where `--out` leads, checked. Raises ValueError and FileExistsError."""
    out = Path(os.path.realpath(given))
    if out.is_symlink():
        raise ValueError(f"--out {given} is a symbolic link that leads back to itself")
    if out == Path(os.path.realpath(os.curdir)):
        raise ValueError(
            f"--out {given or '(nothing)'} is the folder that this runs in, which cannot be made "
            "anew; name a new folder"
        )
    require_empty(out)
    return out


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A new folder on the disk of `out`; what is left of it is removed in the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(prefix=".pretrain-work-", dir=out.parent)
    try:
        # One more, because mkdtemp's own can be entered by its owner only.
        work = Path(made) / "whole"
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(made, ignore_errors=True)


def keep_aside(work: Path, out: Path, ending: str) -> Path:
    """Keep a folder under the first free name of `OUT.ending`, `OUT.ending-2`, ..."""
    for number in count(1):
        aside = out.with_name(f"{out.name}.{ending}" + (f"-{number}" * (number > 1)))
        try:
            aside.mkdir()
        except FileExistsError:
            continue
        move_into_place(work, aside)
        return aside
    raise AssertionError("counting has no end")
