"""Disks and limits that are really exhausted: by the kernel, not by a call that is made to fail.

The size of a file or the number of open files is limited; a small file system is full, has no free
inode, or is read-only. The save fails with the system's own error or succeeds, the older
checkpoints stay complete, and once there is space the same step is saved. Then the real `pretrain
train` runs on a disk that fills up: it continues, stops with 75, and resumed with space it equals
the uninterrupted run. Mounting file systems needs root; without it those rows are skipped and
marked so.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from faults.crash_states import NEW, OLD, save_and_prune
from faults.history import KEEP, History, check_folder
from faults.resumes import check_equal
from faults.table import Row, Unrecovered
from faults.tiny_runs import (
    OFTEN,
    in_child,
    lines_of,
    output_of,
    prepare,
    resume,
    run_hashes,
    train,
)
from pretrain import fileio
from pretrain.checkpoint import save as save_module

N_BYTES, PAGE = 64 << 10, 4096
SAVED, FAILED = 0, 100
"""exit codes of a child that saves; FAILED: with the error that was expected"""


def _attempt(folder: Path, history: History, expected: set[int], limit: Callable[[], None]) -> int:
    """In a child: save under a limit, without the check of free space that would stop it early."""
    limit()
    try:
        with mock.patch.object(fileio, "check_free_space"):
            save_and_prune(folder, history, NEW)
    except OSError as error:
        if error.errno not in expected:
            raise
        return FAILED
    return SAVED


def _is_survived(
    root: Path,
    limit: Callable[[], None],
    expected: set[int],
    *,
    relief: Callable[[], object],
    case: str,
) -> bool:
    """Whether a save in a child reached the limit; Unrecovered if that did harm."""
    history, folder = History(n_bytes=N_BYTES), root / "checkpoints"
    code = in_child(lambda: _attempt(folder, history, expected, limit))
    try:
        if code not in (SAVED, FAILED):
            raise Unrecovered(f"the save ended with exit code {code}")
        check_folder(
            folder, history, allowed=(NEW,) if code == SAVED else (OLD[-1],), min_complete=KEEP
        )
        relief()
        if code == FAILED:
            save_and_prune(folder, history, NEW)
        check_folder(folder, history, allowed=(NEW,), min_complete=KEEP)
    except Unrecovered as error:
        raise Unrecovered(f"{case}: {error}") from None
    return code == FAILED


def _nothing() -> None:
    pass


def limited_files(scratch: Path) -> Row:
    """RLIMIT_FSIZE at every 512 bytes, up to more than the largest file."""
    landed, limits = 0, range(0, N_BYTES // 3, 512)
    for n in limits:
        root = _begun(scratch / f"limit-{n}")
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (n, n))
        landed += _is_survived(root, limit, {errno.EFBIG}, relief=_nothing, case=f"files of {n}")
        shutil.rmtree(root)
    return Row("no file beyond a size", len(limits), landed, landed, "RLIMIT_FSIZE")


def no_more_open_files(scratch: Path) -> Row:
    def limit(more: int) -> None:
        next_one = os.dup(0)
        os.close(next_one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + more, next_one + more))

    landed = 0
    for more in range(2):
        root = _begun(scratch / f"open-{more}")
        landed += _is_survived(
            root, partial(limit, more), {errno.EMFILE}, relief=_nothing, case=f"{more} more files"
        )
        shutil.rmtree(root)
    return Row("no more open files", 2, landed, landed, "RLIMIT_NOFILE")


def _begun(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    History(n_bytes=N_BYTES).begin(root / "checkpoints", OLD)
    return root


@contextmanager
def small_disk(at: Path, options: str) -> Iterator[bool]:
    """Mount a file system in memory; False if that is not permitted."""
    at.mkdir()
    args = ["mount", "-t", "tmpfs", "-o", options, "faults", str(at)]
    there = os.geteuid() == 0 and subprocess.run(args, capture_output=True).returncode == 0
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", str(at)], check=True)
        at.rmdir()


def full_disks(scratch: Path) -> Iterator[Row]:
    """No bytes, no files, and no writing at all."""
    for row in (_no_bytes, _no_names, _read_only):
        found = row(scratch / "disk")
        yield found or Row(row.__name__[1:].replace("_", " "), 0, 0, 0, SKIPPED, ours=False)


SKIPPED = "skipped: a file system of our own needs root"


def _no_bytes(at: Path) -> Row | None:
    """From a disk without a free page to one with enough pages."""
    landed, pages = 0, range(N_BYTES // PAGE + 8)
    with small_disk(at, "size=24m") as there:
        if not there:
            return None
        for free in pages:
            _begun(at)
            ballast = at / "ballast"
            left = shutil.disk_usage(at).free - free * PAGE
            ballast.write_bytes(bytes(left))
            landed += _is_survived(
                at,
                _nothing,
                {errno.ENOSPC},
                relief=ballast.unlink,
                case=f"a disk with {free} free pages",
            )
            shutil.rmtree(at / "checkpoints")
    return Row("a full disk", len(pages), landed, landed, "tmpfs, page by page")


def _no_names(at: Path) -> Row | None:
    landed, names = 0, range(7)
    with small_disk(at, "size=24m,nr_inodes=64") as there:
        if not there:
            return None
        for free in names:
            _begun(at)
            fillers = [at / f"filler-{n}" for n in range(os.statvfs(at).f_favail - free)]
            for filler in fillers:
                filler.touch()

            def relief(fillers: list[Path] = fillers) -> None:
                for filler in fillers:
                    filler.unlink()

            case = f"a disk with {free} free inodes"
            landed += _is_survived(at, _nothing, {errno.ENOSPC}, relief=relief, case=case)
            shutil.rmtree(at / "checkpoints")
    return Row(
        "a disk with no space for a file", len(names), landed, landed, "tmpfs, inode by inode"
    )


def _read_only(at: Path) -> Row | None:
    with small_disk(at, "size=24m") as there:
        if not there:
            return None
        _begun(at)
        remount = ["mount", "-o", "remount,ro", str(at)]
        subprocess.run(remount, check=True)
        relief = partial(subprocess.run, [*remount[:2], "remount,rw", str(at)], check=True)
        landed = _is_survived(at, _nothing, {errno.EROFS}, relief=relief, case="a read-only disk")
        if not landed:
            raise Unrecovered("a save on a read-only disk did not fail")
    return Row("a read-only disk", 1, 1, 1, "tmpfs, remounted")


RESERVE = 8 << 20
"""free bytes of a disk that is full for a checkpoint but not for a line of metrics"""


def train_on_a_full_disk(scratch: Path) -> Iterator[Row]:
    """Run the real command on a disk that fills up after the second checkpoint."""
    text = prepare(scratch)
    args = [*OFTEN, "--model.family", "gpt2", "--train.steps", "24"]
    uninterrupted = scratch / "whole"
    if in_child(lambda: train(text, uninterrupted, *args)) != 0:
        raise Unrecovered(f"the uninterrupted run failed: {output_of(uninterrupted)}")
    expected = run_hashes(uninterrupted)
    for free, what in ((RESERVE, "no space for a checkpoint"), (0, "no space for a byte")):
        with small_disk(scratch / "disk", "size=64m") as there:
            name = f"`pretrain train`, {what}"
            if not there:
                yield Row(name, 0, 0, 0, SKIPPED, ours=False)
                continue
            steps = _filled_up(scratch / "disk", text, args, expected, free=free)
            note = f"exit code 75 after step {steps}, resumed with space, equal"
            yield Row(name, 1, 1, 1, note)
    for number in (errno.EROFS, errno.EIO):
        run = scratch / f"failing-{number}"
        steps = _broken_disk(run, text, args, expected, number=number)
        note = f"from the second checkpoint on; exit code 75 after step {steps}, resumed, equal"
        yield Row(
            f"`pretrain train`, {errno.errorcode[number]} for all that is written", 1, 1, 1, note
        )


def _filled_up(
    at: Path, text: Path, args: list[str], expected: dict[str, str], *, free: int
) -> int:
    """Train on a disk that is filled until only `free` bytes are left; returns the number of
    steps."""
    run, ballast, real, saves = at / "run", at / "ballast", save_module.save_checkpoint, 0

    def filling(*args: Any, **keywords: Any) -> Path:
        nonlocal saves
        saves += 1
        if saves == 3:
            ballast.write_bytes(bytes(shutil.disk_usage(at).free - free))
        return real(*args, **keywords)

    def child() -> int:
        with mock.patch.object(save_module, "save_checkpoint", filling):
            return train(text, run, *args)

    return _stopped_and_resumed(run, child, ballast.unlink, expected, f"{free} bytes free")


def _broken_disk(
    run: Path, text: Path, args: list[str], expected: dict[str, str], *, number: int
) -> int:
    real_save, real_open, saves = save_module.save_checkpoint, open, 0
    real_os_open = os.open

    def failing(file: Any, mode: str = "r", *args: Any, **keywords: Any) -> Any:
        if saves >= 3 and set(mode) & set("wax+") and str(file).startswith(f"{run}/"):
            raise OSError(number, os.strerror(number), str(file))
        return real_open(file, mode, *args, **keywords)

    def failing_os_open(path: Any, flags: int, *args: Any, **keywords: Any) -> int:
        if saves >= 3 and flags & (os.O_WRONLY | os.O_CREAT) and str(path).startswith(f"{run}/"):
            raise OSError(number, os.strerror(number), str(path))
        return real_os_open(path, flags, *args, **keywords)

    def save(*args: Any, **keywords: Any) -> Path:
        nonlocal saves
        saves += 1
        if saves >= 3:
            raise OSError(number, os.strerror(number), str(run))
        return real_save(*args, **keywords)

    def child() -> int:
        with (
            mock.patch.object(save_module, "save_checkpoint", save),
            mock.patch("builtins.open", failing),
            mock.patch("os.open", failing_os_open),
        ):
            return train(text, run, *args)

    return _stopped_and_resumed(run, child, _nothing, expected, errno.errorcode[number])


def _stopped_and_resumed(
    run: Path,
    child: Callable[[], int],
    relief: Callable[[], object],
    expected: dict[str, str],
    case: str,
) -> int:
    code = in_child(child)
    if code != 75:
        raise Unrecovered(f"{case}: exit code {code}, not 75: {output_of(run)}")
    steps = max(int(line["step"]) for line in lines_of(run / "metrics.jsonl"))
    relief()
    if in_child(lambda: resume(run)) != 0:
        raise Unrecovered(f"{case}: the resume failed: {output_of(run)}")
    check_equal(run, expected, case)
    return steps
