"""Locks, atomic replacement and JSON of `pretrain.fileio`."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain import fileio
from pretrain.fileio import (
    file_lock,
    is_fixed,
    move_into_place,
    nan_to_null,
    read_json,
    replace_file,
    replacing,
    write_json,
)


def test_a_second_process_is_rejected_with_the_owner_of_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with file_lock(path, action="trained") as warning:
        assert warning is None
        message = f"{tmp_path} is being trained by process {os.getpid()} on .*; wait for it, or"
        with pytest.raises(ValueError, match=message), file_lock(path, action="trained"):
            pass
        assert path.exists()  # the rejected one has not deleted it
    assert list(tmp_path.iterdir()) == []
    path.write_text("left by a killed process")
    with file_lock(path), pytest.raises(ValueError, match="is being used"), file_lock(path):
        pass


def test_a_lock_file_deleted_between_open_and_lock_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous owner may end in between, and delete its file."""
    path = tmp_path / "run.lock"
    flock, calls = fcntl.flock, 0

    def delayed(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", delayed)
    with file_lock(path):
        assert calls == 2
        with pytest.raises(ValueError, match="is being used by process"), file_lock(path):
            pass


@pytest.mark.parametrize("has_fcntl", [True, False])
def test_missing_locks_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_fcntl: bool
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if has_fcntl:
        monkeypatch.setattr(fcntl, "flock", fail)
    else:
        monkeypatch.setattr(fileio, "fcntl", None)
    path = tmp_path / "run.lock"
    with file_lock(path) as warning:
        assert warning == f"{path}: file locking is not available (No locks available)"
    assert not path.exists()


def test_waiting_owners_get_the_lock_one_after_the_other(tmp_path: Path) -> None:
    inside: list[str] = []
    seen: list[list[str]] = []

    def work(name: str, delay: float, seconds: float) -> None:
        time.sleep(delay)
        with file_lock(tmp_path / "work.lock", wait=True):
            inside.append(name)
            seen.append(list(inside))
            time.sleep(seconds)
            inside.remove(name)

    # The second waits for a file that the first deletes; the third finds none and creates one.
    schedule = [("a", 0.0, 0.2), ("b", 0.1, 0.4), ("c", 0.4, 0.0)]
    threads = [threading.Thread(target=work, args=each) for each in schedule]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["a"], ["b"], ["c"]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_folder_without_fsync_is_said_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """CIFS before Linux 4.17, some of FUSE: borg issue 1287 (2016), libgit2 issue 5356 (2020)."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fileio, "_not_flushed", set())
    for name in ("a", "b"):
        replace_file(tmp_path / name, b"content")
        assert (tmp_path / name).read_bytes() == b"content"
    (message,) = caplog.messages
    assert f"{tmp_path} cannot be flushed to its disk ({os.strerror(number)})" in message


def test_an_error_of_the_disk_while_a_folder_is_flushed_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        fileio.sync_folder(tmp_path)


def test_a_file_system_without_advice_and_sizes_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of FUSE report 0 bytes of 0, or take no advice on their pages."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "posix_fadvise", fail)
    nothing = shutil.disk_usage(tmp_path)._replace(total=0, used=0, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: nothing)
    replace_file(tmp_path / "file", b"content")
    fileio.check_free_space(tmp_path, n_bytes=1000, n_files=1)
    full = nothing._replace(total=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    with pytest.raises(OSError, match="needs 1,000 bytes, but only 0 are free"):
        fileio.check_free_space(tmp_path, n_bytes=1000, n_files=1)


def test_a_file_that_is_a_mount_point_is_written_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `docker run -v $PWD/page.html:/out/page.html`: rename(2) fails with EBUSY."""
    path = tmp_path / "page.html"
    path.write_bytes(b"an older and longer page")
    number = path.stat().st_ino

    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "replace", busy)
    replace_file(path, b"page")
    assert path.read_bytes() == b"page"
    assert path.stat().st_ino == number
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_replaced_gets_the_files_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A volume of Docker or Kubernetes (EBUSY): QwenPaw issue 3827 (2026); or a folder in one of
    others. The file by which a reader knows that all are there comes last."""
    out = tmp_path / "my volume"
    out.mkdir(mode=0o700)
    inode = out.stat().st_ino
    assert not is_fixed(out)
    assert (out.stat().st_ino, out.stat().st_mode & 0o777) == (inode, 0o700)
    assert [*tmp_path.iterdir()] == [out]
    assert not is_fixed(tmp_path / "new")
    moved: list[str] = []
    real = os.rename

    def rename(old: Path, new: Path) -> None:
        if old == out:
            raise OSError(number, os.strerror(number))
        real(old, new)
        moved.append(old.name)

    monkeypatch.setattr(os, "rename", rename)
    assert is_fixed(out)

    work = out / f"{fileio.WORK}-1" / "finished"
    (work / "tokenizer").mkdir(parents=True)
    for name in ("a.bin", "manifest.json", "train.bin", "tokenizer/tokenizer.json"):
        (work / name).write_text(name)
    move_into_place(work, out)
    assert moved[-1] == "manifest.json"
    assert sorted(moved) == ["a.bin", "manifest.json", "tokenizer", "train.bin"]
    assert (out / "tokenizer/tokenizer.json").is_file()
    work.mkdir()
    with pytest.raises(FileExistsError, match="exists and has 4 files"):
        move_into_place(work, out)


def test_an_error_while_a_file_is_replaced_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half of the new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged: it is not JSON"),
        ("[]", "is damaged: it is not a JSON object"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ("[" * 100_000, "is damaged: it is not JSON"),
        (b"\xff", "is damaged: it is not JSON"),
    ],
)
def test_damaged_json_is_rejected_with_the_name_of_the_file(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_json_larger_than_any_of_ours_is_not_read(tmp_path: Path) -> None:
    write_json(tmp_path / "large.json", {"key": "a long value"})
    with pytest.raises(ValueError, match=r"large\.json has 27 bytes; it must have at most 10"):
        read_json(tmp_path / "large.json", most_bytes=10)


def test_json_is_written_once_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    content = {"loss": float("nan"), "steps": [1, float("inf")], "name": "\udcff"}
    write_json(path, nan_to_null(content), ascii_only=True)
    assert read_json(path) == {"loss": None, "steps": [1, None], "name": "\udcff"}
    with pytest.raises(FileExistsError):
        write_json(path, {})
    write_json(path, {"step": 2}, replace=True)
    assert read_json(path) == {"step": 2}
