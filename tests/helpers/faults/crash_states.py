"""Every state that a power loss may leave of one save and the deletion after it.

The calls of a real save are recorded; after each of them, every folder that the model of
`recording` allows is made on a disk and checked: the step before or the new one must be found,
complete and with the right numbers, no incomplete folder has a final name, and there are never
fewer complete checkpoints than before. Once the save has returned, the new one must be found; and
the next save must succeed on what is left.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from faults.history import KEEP, History, check_folder
from faults.recording import Disk, Recorder, Tree, recorded, write_tree
from faults.table import Row, Unrecovered
from pretrain.checkpoint import save as save_module

OLD, NEW = (1, 2), 3
N_BYTES = 1 << 10


def save_and_prune(
    folder: Path,
    history: History,
    step: int,
    *,
    verify: bool = False,
    saved: Callable[[], object] = lambda: None,
) -> None:
    """A save and the deletion after it; `saved` is called in between. What is saved is read back
    only if it is to be verified: the writing must be right without that."""
    tensors, state = history.tensors(step), history.state(step)
    path = save_module.save_checkpoint(folder, step=step, tensors=tensors, state=state)
    if verify:
        save_module.verify_saved(path)
    saved()
    save_module.prune(folder, keep=KEEP)


def record_a_save(root: Path, history: History) -> tuple[Disk, Recorder, int]:
    """A disk before a save, the calls of the save, and how many of them it made until it
    returned."""
    root.mkdir()
    folder = root / "checkpoints"
    history.begin(folder, OLD)
    disk, returned = Disk(root), 0
    with recorded() as recorder:

        def saved() -> None:
            nonlocal returned
            returned = len(recorder.operations)

        save_and_prune(folder, history, NEW, saved=saved)
    return disk, recorder, returned


def enumerate_states(scratch: Path) -> Row:
    """All states, each checked once."""
    history = History(n_bytes=N_BYTES)
    disk, recorder, returned = record_a_save(scratch / "recorded", history)
    found = check_states(scratch, history, disk, recorder, returned=returned)
    reject_unrecorded(disk, scratch / "recorded")
    note = f"{len(recorder.operations)} calls; {found[0]:,} states, of which {found[1]:,} differ"
    return Row("power loss in a save, every state", found[1], found[1], found[1], note)


def check_states(
    scratch: Path, history: History, disk: Disk, recorder: Recorder, *, returned: int
) -> tuple[int, int]:
    """The number of states, and of different ones that were checked; Unrecovered for the first
    wrong one."""
    seen: set[tuple[str, bool]] = set()
    states = 0
    for number in range(len(recorder.operations) + 1):
        if number:
            disk.apply(recorder.operations[number - 1])
        promised = number >= returned > 0
        for tree in disk.after_power_loss():
            states += 1
            key = (_hash(tree), promised)
            if key in seen:
                continue
            seen.add(key)
            place = scratch / "state"
            write_tree(tree, place)
            try:
                folder = place / "checkpoints"
                allowed = (NEW,) if promised else (OLD[-1], NEW)
                check_folder(folder, history, allowed=allowed, min_complete=KEEP)
                save_and_prune(folder, history, NEW + 1)
                check_folder(folder, history, allowed=(NEW + 1,), min_complete=KEEP)
            except Unrecovered as error:
                done = recorder.operations[number - 1] if number else "nothing"
                raise Unrecovered(
                    f"power loss after call {number}, {done!s:.200}: {error}"
                ) from None
            finally:
                shutil.rmtree(place)
    return states, len(seen)


def reject_unrecorded(disk: Disk, root: Path) -> None:
    """Unrecovered if replaying the recorded calls does not give the real folder: something was
    written by other calls."""
    real = scratch_tree(root)
    if _hash(disk.tree()) != _hash(real):
        raise Unrecovered("the recorded calls are not all that the save did")


def scratch_tree(root: Path) -> Tree:
    return {
        each.name: scratch_tree(each) if each.is_dir() else each.read_bytes()
        for each in root.iterdir()
    }


def _hash(tree: Tree) -> str:
    # Ignore the random end of a temporary name.
    lines = sorted(
        name.partition(".tmp-")[0].partition(".old-")[0]
        + (hashlib.sha256(each).hexdigest() if isinstance(each, bytes) else _hash(each))
        for name, each in tree.items()
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def traced_calls(scratch: Path) -> tuple[list[str], list[str]] | None:
    """The calls of a save as recorded here, and as the kernel saw them (strace); None if strace
    is missing or not permitted."""
    if shutil.which("strace") is None or _may_not_trace():
        return None
    log = scratch / "strace.txt"
    args = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=" + TRACED]
    args += [sys.executable, "-m", "faults.crash_states", str(scratch / "traced")]
    here_too = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    done = subprocess.run(args, capture_output=True, text=True, env=here_too)
    if done.returncode:
        raise Unrecovered(f"the traced save failed: {done.stderr}")
    here = [f"{call} {name}" for call, name in (line.split() for line in done.stdout.splitlines())]
    return here, _kernel_calls(log.read_text(), str(scratch / "traced" / "checkpoints"))


def compare_with_the_kernel(scratch: Path) -> Row:
    """Unrecovered if the kernel saw other calls, or another order, than were recorded."""
    name = "the kernel saw the calls that were recorded"
    found = traced_calls(scratch)
    if found is None:
        return Row(name, 0, 0, 0, "skipped: no strace, or it may not trace here", ours=False)
    here, kernel = found
    if here != kernel:
        raise Unrecovered(f"recorded: {here}; the kernel saw: {kernel}")
    return Row(name, len(here), len(kernel), len(kernel), "strace -f, call by call, in order")


def _may_not_trace() -> bool:
    return subprocess.run(["strace", "-qq", "true"], capture_output=True).returncode != 0


TRACED = "write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,unlink,"
TRACED += "unlinkat,rmdir,ftruncate,truncate,link,linkat,symlink,symlinkat"
# One name for what the C library may choose between.
_SAME = {"renameat": "rename", "renameat2": "rename", "mkdirat": "mkdir", "unlinkat": "unlink"}


def _kernel_calls(log: str, folder: str) -> list[str]:
    """Calls on paths below `folder`, between the two marks that the traced program makes."""
    calls: list[str] = []
    between = False
    for line in log.splitlines():
        text = line.partition(" ")[2].strip()
        if "mark-" in text and text.startswith("mkdir"):
            between = "mark-begin" in text
        elif between and folder in text and " = -1 " not in text:
            name = text.partition("(")[0]
            if name == "unlinkat" and "AT_REMOVEDIR" in text:
                name = "rmdir"
            if name in ("write", "fsync"):
                path = text.partition("<")[2].partition(">")[0]
            else:
                path = text.partition('"')[2].partition('"')[0]
            calls.append(f"{_SAME.get(name, name)} {Path(path).name}")
    return calls


def _traced_save(root: Path) -> None:
    """One save between two marks; prints the calls that it made."""
    history = History(n_bytes=N_BYTES)
    history.begin(root / "checkpoints", OLD)
    os.mkdir(root / "mark-begin")
    with recorded() as recorder:
        save_and_prune(root / "checkpoints", history, NEW)
    os.mkdir(root / "mark-end")
    for operation in recorder.operations:
        if operation.call != "create":  # for the kernel it is an open
            print(operation.call, operation.path.name)


if __name__ == "__main__":
    _traced_save(Path(sys.argv[1]))
