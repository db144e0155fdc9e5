"""The system calls of a save, and what a disk may contain after any of them.

`recorded` notes every call that changes files while a block runs. `Disk` takes such calls in, one
after another, and knows what of them a power loss may take back. The model is that of Pillai et
al., "All File Systems Are Not Created Equal" (OSDI 2014), at its weakest: data that were not
fsynced since they were written may be there, missing, cut or zero; names that were made, changed or
deleted since the folder was last fsynced may each be there or not, in any combination, only that a
rename is never half done. What was fsynced is there. After a fsync that failed the data are not on
the disk, and a later one that succeeds does not bring them there (Rebello et al., USENIX ATC 2020).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = "open write fsync close rename mkdir unlink rmdir".split()
# So many pending names are tried in every combination; of more, none, all, each and all but each.
MOST_COMBINED = 7


@dataclass(frozen=True, slots=True)
class Operation:
    """One call that changed something: its name, the path, and what it carried."""

    call: str
    path: Path
    data: bytes = b""
    target: Path | None = None
    failed: bool = False


class Recorder:
    """Replaces the calls of `os`; `before` may raise instead of a call, or change the bytes of a
    write."""

    def __init__(self, before: Callable[[str, Path, bytes], bytes] | None = None) -> None:
        self.operations: list[Operation] = []
        self._before = before or (lambda call, path, data: data)
        self._real: dict[str, Any] = {name: getattr(os, name) for name in CALLS}
        self._open: dict[int, Path] = {}

    def _ask(self, call: str, path: Path, data: bytes = b"") -> bytes:
        try:
            return self._before(call, path, data)
        except OSError:
            self.operations.append(Operation(call, path, failed=True))
            raise

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        where = Path(path)
        self._ask("open", where)
        descriptor: int = self._real["open"](path, flags, mode)
        self._open[descriptor] = where
        if flags & os.O_CREAT:
            self.operations.append(Operation("create", where))
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        path, whole = self._open[descriptor], bytes(data)
        taken = self._ask("write", path, whole)
        n = int(self._real["write"](descriptor, taken))
        self.operations.append(Operation("write", path, taken[:n]))
        return n

    def fsync(self, descriptor: int) -> None:
        path = self._open[descriptor]
        self._ask("fsync", path)
        self._real["fsync"](descriptor)
        self.operations.append(Operation("fsync", path))

    def close(self, descriptor: int) -> None:
        self._real["close"](descriptor)
        path = self._open.pop(descriptor, None)
        if path is not None:
            self._ask("close", path)

    def rename(self, source: Any, target: Any) -> None:
        self._ask("rename", Path(source))
        self._real["rename"](source, target)
        self.operations.append(Operation("rename", Path(source), target=Path(target)))
        # An open file continues under its new name.
        for descriptor, path in self._open.items():
            if path.is_relative_to(source):
                self._open[descriptor] = Path(target) / path.relative_to(source)
        self._ask("renamed", Path(target))

    def mkdir(self, path: Any, mode: int = 0o777) -> None:
        self._ask("mkdir", Path(path))
        self._real["mkdir"](path, mode)
        self.operations.append(Operation("mkdir", Path(path)))

    def unlink(self, path: Any) -> None:
        self._ask("unlink", Path(path))
        self._real["unlink"](path)
        self.operations.append(Operation("unlink", Path(path)))

    def rmdir(self, path: Any) -> None:
        self._ask("rmdir", Path(path))
        self._real["rmdir"](path)
        self.operations.append(Operation("rmdir", Path(path)))


@contextmanager
def recorded(before: Callable[[str, Path, bytes], bytes] | None = None) -> Iterator[Recorder]:
    """Within, the calls of `os` that change files are noted, and may be made to fail."""
    recorder = Recorder(before)
    real = {name: getattr(os, name) for name in CALLS}
    for name in CALLS:
        setattr(os, name, getattr(recorder, name))
    try:
        yield recorder
    finally:
        for name, function in real.items():
            setattr(os, name, function)


@dataclass(eq=False, slots=True)
class _File:
    safe: bytes = b""
    """on the disk, whatever happens"""
    now: bytes = b""
    """what a reader is given until then"""
    lost: bool = False
    """a fsync of it has failed"""

    def sync(self) -> None:
        self.safe = self.now


@dataclass(eq=False, slots=True)
class _Folder:
    safe: dict[str, _File | _Folder] = field(default_factory=dict)
    now: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[tuple[str, str | None, _File | _Folder | None]] = field(default_factory=list)
    """since the last fsync: a name that goes, and the one that comes, with what it names"""
    lost: bool = False

    def sync(self) -> None:
        self.safe, self.pending = dict(self.now), []


Tree = dict[str, "bytes | Tree"]


class Disk:
    """A folder after some operations: as it is, and as it may be after a power loss."""

    def __init__(self, root: Path) -> None:
        self._root, self._top = root, self._read(root)

    def _read(self, path: Path) -> _Folder:
        folder = _Folder()
        for each in sorted(path.iterdir()):
            if each.is_dir():
                folder.now[each.name] = self._read(each)
            else:
                content = each.read_bytes()
                folder.now[each.name] = _File(content, content)
        folder.safe = dict(folder.now)
        return folder

    def _entry(self, path: Path) -> _File | _Folder:
        found: _File | _Folder = self._top
        for name in path.relative_to(self._root).parts:
            assert isinstance(found, _Folder)
            found = found.now[name]
        return found

    def _folder(self, path: Path) -> _Folder:
        found = self._entry(path)
        assert isinstance(found, _Folder)
        return found

    def apply(self, operation: Operation) -> None:
        path, call = operation.path, operation.call
        if operation.failed:
            if call == "fsync":
                self._entry(path).lost = True
            return
        if call == "fsync":
            synced = self._entry(path)
            if not synced.lost:
                synced.sync()
            return
        if call == "write":
            file = self._entry(path)
            assert isinstance(file, _File)
            file.now += operation.data
            return
        parent = self._folder(path.parent)
        if call in ("create", "mkdir"):
            made = _File() if call == "create" else _Folder()
            parent.now[path.name] = made
            parent.pending.append(("", path.name, made))
        elif call in ("unlink", "rmdir"):
            del parent.now[path.name]
            parent.pending.append((path.name, None, None))
        else:
            assert call == "rename"
            assert operation.target is not None
            moved, target = parent.now.pop(path.name), self._folder(operation.target.parent)
            target.now[operation.target.name] = moved
            if target is parent:
                parent.pending.append((path.name, operation.target.name, moved))
            else:  # between folders: the new name may be there before the old one has gone
                parent.pending.append((path.name, None, None))
                target.pending.append(("", operation.target.name, moved))

    def tree(self) -> Tree:
        """The folder as every program sees it that runs."""

        def view(folder: _Folder) -> Tree:
            return {
                name: each.now if isinstance(each, _File) else view(each)
                for name, each in folder.now.items()
            }

        return view(self._top)

    def after_power_loss(self) -> Iterator[Tree]:
        """Every folder that may be found after a power loss at this moment."""
        folders, files = self._all(self._top)
        pending = [(f, n) for f in folders for n in range(len(f.pending))]
        unsafe = [f for f in files if f.safe != f.now]
        for names in _subsets(len(pending)):
            kept = {pending[n] for n in names}
            for data in _choices(unsafe):
                yield self._view(self._top, kept, data)

    def _all(self, folder: _Folder) -> tuple[list[_Folder], list[_File]]:
        """Everything that any name, safe or pending, may lead to."""
        folders: list[_Folder] = []
        files: list[_File] = []

        def visit(each: _File | _Folder) -> None:
            if isinstance(each, _File):
                if each not in files:
                    files.append(each)
            elif each not in folders:
                folders.append(each)
                for child in (*each.safe.values(), *each.now.values()):
                    visit(child)
                for _, _, named in each.pending:
                    if named is not None:
                        visit(named)

        visit(folder)
        return folders, files

    def _view(
        self, folder: _Folder, kept: set[tuple[_Folder, int]], data: dict[_File, bytes]
    ) -> Tree:
        names = dict(folder.safe)
        for number, (gone, come, named) in enumerate(folder.pending):
            if (folder, number) in kept:
                names.pop(gone, None)
                if come is not None and named is not None:
                    names[come] = named
        return {
            name: data.get(each, each.safe)
            if isinstance(each, _File)
            else self._view(each, kept, data)
            for name, each in names.items()
        }


def _subsets(n: int) -> Iterator[tuple[int, ...]]:
    everything = tuple(range(n))
    if n <= MOST_COMBINED:
        for size in range(n + 1):
            yield from itertools.combinations(everything, size)
        return
    yield ()
    yield everything
    for each in everything:
        yield (each,)
        yield tuple(other for other in everything if other != each)


def _choices(files: list[_File]) -> Iterator[dict[_File, bytes]]:
    """What files may hold whose data were not brought to the disk: each kind of loss for one of
    them, the rest whole, and for all of them."""
    fates = [_kept, _missing, _cut, _zero]
    if len(files) <= 2:
        for chosen in itertools.product(fates, repeat=len(files)):
            yield {file: fate(file) for file, fate in zip(files, chosen, strict=True)}
        return
    for fate in fates:
        yield {file: fate(file) for file in files}
        if fate is not _kept:
            for one in files:
                yield {file: fate(file) if file is one else file.now for file in files}


def _kept(file: _File) -> bytes:
    return file.now


def _missing(file: _File) -> bytes:
    return file.safe


def _cut(file: _File) -> bytes:
    return file.now[: (len(file.safe) + len(file.now)) // 2]


def _zero(file: _File) -> bytes:
    return file.safe + bytes(len(file.now) - len(file.safe))


def write_tree(tree: Tree, root: Path) -> None:
    """Make a folder of it on a real disk."""
    root.mkdir()
    for name, each in tree.items():
        if isinstance(each, bytes):
            (root / name).write_bytes(each)
        else:
            write_tree(each, root / name)
