"""The folder of `--out`: written under a temporary name in the same parent folder, then renamed; in
the folder itself if that is a mount point.

Symbolic links are followed. A folder that is not empty is rejected, and so is the current one. Only
files of this process are ever removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from pretrain.fileio import WORK, is_fixed, move_into_place, require_empty


def resolve_out(given: str) -> Path:
    """Return the real path of `--out`. ValueError, or FileExistsError if it is not empty."""
    out = Path(os.path.realpath(given))
    if out.is_symlink():
        raise ValueError(f"--out {given} is a symbolic link that leads back to itself")
    if out == Path(os.path.realpath(os.curdir)):
        raise ValueError(
            f"--out {given or '(nothing)'} is the current folder, which cannot be replaced; name "
            "a new folder"
        )
    require_empty(out)
    return out


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder on the disk of `out`. It becomes `out` when the block ends without
    an error, unless it was kept aside."""
    out.parent.mkdir(parents=True, exist_ok=True)
    inside = is_fixed(out)
    temporary = tempfile.mkdtemp(prefix=f"{WORK}-", dir=out if inside else out.parent)
    try:
        # A folder in it, because that of mkdtemp is only for its owner.
        work = Path(temporary) / "out"
        work.mkdir()
        yield work
        if work.exists():
            move_into_place(work, out)
    except OSError as error:
        error.filename = error.filename or str(out)  # libraries do not say what is full
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def keep_aside(work: Path, out: Path, ending: str) -> Path:
    """Keep a folder under the first free name of `OUT.ending`, `OUT.ending-2`, ...; in OUT, if that
    is a mount point."""
    out = out / out.name if is_fixed(out) else out
    for number in count(1):
        aside = out.with_name(
            f"{out.name}.{ending}" if number == 1 else f"{out.name}.{ending}-{number}"
        )
        try:
            aside.mkdir()
        except FileExistsError:
            continue
        move_into_place(work, aside)
        return aside
    raise AssertionError("count() has no end")
