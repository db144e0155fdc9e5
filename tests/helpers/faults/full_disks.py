"""Disks and limits that are really exhausted: by the kernel, not by a call that is made to fail.

A process may write no file beyond so many bytes, or open no more files; a small file system is
full, has no room for another file, or is read-only. The save fails with the system's own error or
does its work, the older checkpoints are whole, and once there is room the same step is saved. Then
the real `pretrain train` on a disk that fills up: it goes on, stops with 75, and resumed with room
it becomes the uninterrupted run. File systems of our own need root; without, they are left out, and
that is said.
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
from faults.history import KEEP, History, judge
from faults.resumes import refuse_difference
from faults.table import Row, Unrecovered
from faults.tiny_runs import OFTEN, in_child, lines_of, picture, prepare, resume, said, train
from pretrain import fileio
from pretrain.checkpoint import save as saver_page

N_BYTES, PAGE = 64 << 10, 4096
SAVED, FAILED = 0, 100
"""exit codes of a child that saves; FAILED: with the error that was expected"""


def _attempt(folder: Path, history: History, expected: set[int], limit: Callable[[], None]) -> int:
    """In a child: save under a limit, without the look at free space that would stop it early."""
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
    """Whether a save in a child came to the limit; Unrecovered if that did harm."""
    history, folder = History(n_bytes=N_BYTES), root / "checkpoints"
    code = in_child(lambda: _attempt(folder, history, expected, limit))
    try:
        if code not in (SAVED, FAILED):
            raise Unrecovered(f"the save ended with exit code {code}")
        judge(folder, history, allowed=(NEW,) if code == SAVED else (OLD[-1],), least_whole=KEEP)
        relief()
        if code == FAILED:
            save_and_prune(folder, history, NEW)
        judge(folder, history, allowed=(NEW,), least_whole=KEEP)
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
    return Row("no file beyond so many bytes", len(limits), landed, landed, "RLIMIT_FSIZE")


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
    """A file system in memory; False where none may be made."""
    at.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "faults", str(at)]
    there = os.geteuid() == 0 and subprocess.run(words, capture_output=True).returncode == 0
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
    """From a disk on which not a page is free to one on which all have room."""
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

            case = f"a disk with room for {free} files"
            landed += _is_survived(at, _nothing, {errno.ENOSPC}, relief=relief, case=case)
            shutil.rmtree(at / "checkpoints")
    return Row(
        "a disk with no room for a file", len(names), landed, landed, "tmpfs, inode by inode"
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
"""free bytes of a disk that is full for checkpoints and not for a line of metrics"""


def train_on_a_full_disk(scratch: Path) -> Iterator[Row]:
    """The real thing, on a disk that fills up after the second checkpoint."""
    text = prepare(scratch)
    words = [*OFTEN, "--model.family", "gpt2", "--train.steps", "24"]
    whole = scratch / "whole"
    if in_child(lambda: train(text, whole, *words)) != 0:
        raise Unrecovered(f"a run in peace failed: {said(whole)}")
    wanted = picture(whole)
    for free, what in ((RESERVE, "no room for a checkpoint"), (0, "no room for a byte")):
        with small_disk(scratch / "disk", "size=64m") as there:
            name = f"`pretrain train`, {what}"
            if not there:
                yield Row(name, 0, 0, 0, SKIPPED, ours=False)
                continue
            steps = _filled_up(scratch / "disk", text, words, wanted, free=free)
            note = f"exit code 75 after step {steps}, resumed with room, equal"
            yield Row(name, 1, 1, 1, note)
    for number in (errno.EROFS, errno.EIO):
        run = scratch / f"failing-{number}"
        steps = _broken_disk(run, text, words, wanted, number=number)
        note = f"from the second checkpoint on; exit code 75 after step {steps}, resumed, equal"
        yield Row(
            f"`pretrain train`, {errno.errorcode[number]} for all that is written", 1, 1, 1, note
        )


def _filled_up(at: Path, text: Path, words: list[str], wanted: dict[str, str], *, free: int) -> int:
    """How many steps were made on a disk that is filled up until only so many bytes are free."""
    run, ballast, real, saves = at / "run", at / "ballast", saver_page.save_checkpoint, 0

    def filling(*args: Any, **keywords: Any) -> Path:
        nonlocal saves
        saves += 1
        if saves == 3:
            ballast.write_bytes(bytes(shutil.disk_usage(at).free - free))
        return real(*args, **keywords)

    def child() -> int:
        with mock.patch.object(saver_page, "save_checkpoint", filling):
            return train(text, run, *words)

    return _stopped_and_resumed(run, child, ballast.unlink, wanted, f"{free} bytes free")


def _broken_disk(
    run: Path, text: Path, words: list[str], wanted: dict[str, str], *, number: int
) -> int:
    real_save, real_open, saves = saver_page.save_checkpoint, open, 0

    def failing(file: Any, mode: str = "r", *args: Any, **keywords: Any) -> Any:
        if saves >= 3 and set(mode) & set("wax+") and str(file).startswith(f"{run}/"):
            raise OSError(number, os.strerror(number), str(file))
        return real_open(file, mode, *args, **keywords)

    def save(*args: Any, **keywords: Any) -> Path:
        nonlocal saves
        saves += 1
        if saves >= 3:
            raise OSError(number, os.strerror(number), str(run))
        return real_save(*args, **keywords)

    def child() -> int:
        with (
            mock.patch.object(saver_page, "save_checkpoint", save),
            mock.patch("builtins.open", failing),
        ):
            return train(text, run, *words)

    return _stopped_and_resumed(run, child, _nothing, wanted, errno.errorcode[number])


def _stopped_and_resumed(
    run: Path,
    child: Callable[[], int],
    relief: Callable[[], object],
    wanted: dict[str, str],
    case: str,
) -> int:
    code = in_child(child)
    if code != 75:
        raise Unrecovered(f"{case}: exit code {code}, not 75: {said(run)}")
    steps = max(int(line["step"]) for line in lines_of(run / "metrics.jsonl"))
    relief()
    if in_child(lambda: resume(run)) != 0:
        raise Unrecovered(f"{case}: the resume failed: {said(run)}")
    refuse_difference(run, wanted, case)
    return steps
