"""Damaged checkpoints: changed bits, ends, files and manifests.

Every bit of every file of a checkpoint is flipped, one at a time; files are cut, made longer,
zeroed, exchanged, renamed; manifests are edited. Each time the reader must raise an error before it
returns a number, and fall back to the checkpoint before. A flip that leaves the manifest the same
JSON (an "e" to an "E" in a number) has changed nothing, and is counted apart. For comparison, the
same flips are read by `torch.load` and by safetensors.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from faults.history import History
from faults.table import Row, Unrecovered
from pretrain.checkpoint.format import MANIFEST, DamagedCheckpoint, manifest_hash
from pretrain.checkpoint.load import Checkpoint, newest_good
from pretrain.checkpoint.save import save_checkpoint as save

N_BYTES = 1 << 10


def _checkpoint(folder: Path, step: int, history: History) -> Path:
    tensors, state = history.tensors(step), history.state(step)
    return save(folder, step=step, tensors=tensors, state=state)


def _is_rejected(path: Path) -> bool:
    try:
        Checkpoint(path).verify()
    except DamagedCheckpoint:
        return True
    return False


def flip_bits(scratch: Path, *, every: int, seed: int) -> Row:
    """Every bit, or one in `every` from a random first one."""
    history, folder = History(n_bytes=N_BYTES), scratch / "flipped"
    path = _checkpoint(folder, 1, history)
    first, number, found, same = random.Random(seed).randrange(every), 0, 0, 0
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for place, bit in ((p, b) for p in range(len(good)) for b in range(8)):
            number += 1
            if number % every != first:
                continue
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            file.write_bytes(bad)
            if _is_rejected(path):
                found += 1
            elif file.name == MANIFEST and _same_json(good, bytes(bad)):
                same += 1
            else:
                raise Unrecovered(f"bit {bit} of byte {place} of {file.name} was flipped unnoticed")
        file.write_bytes(good)
    if _is_rejected(path):
        raise Unrecovered("a checkpoint that was repaired is rejected")
    note = f"of {number:,} bits in {len(list(path.iterdir()))} files; {same} more changed no value"
    return Row("bit flips", found + same, found, found, note)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def flip_for_others(scratch: Path, *, n: int, seed: int) -> list[Row]:
    """Flips in the numbers of files that others write: `survived` are those that were noticed."""
    tensors = History(n_bytes=N_BYTES).tensors(1)
    torch_file, tensor_file = scratch / "ckpt.pt", scratch / "model.safetensors"
    torch.save(tensors, torch_file)
    save_file(tensors, tensor_file)
    loaders: list[tuple[Path, Callable[[Path], object]]] = [
        (torch_file, lambda path: torch.load(path, weights_only=True)),
        (tensor_file, load_file),
    ]
    rows, chosen = [], random.Random(seed)
    for file, load in loaders:
        good, noticed = file.read_bytes(), 0
        raw = [t.numpy().tobytes() for t in tensors.values()]
        places = [good.index(each) + k for each in raw for k in range(len(each))]
        for _ in range(n):
            bad = bytearray(good)
            bad[chosen.choice(places)] ^= 1 << chosen.randrange(8)
            file.write_bytes(bad)
            try:
                load(file)
            except Exception:  # any exception counts
                noticed += 1
        name = "`torch.load`" if load is not load_file else "safetensors"
        rows.append(Row(f"bit flips in numbers, {name}", n, n, noticed, ours=False))
    return rows


Damage = Callable[[Path, Path], None]
"""Of the newest checkpoint, and the one before it."""


def _damages() -> Iterator[tuple[str, Damage]]:
    names = ("extra-00000.safetensors", "model-00000.safetensors", "optimizer-00000.safetensors")
    for name in (*names, MANIFEST):
        for n in (0, 1, 2, 3, 7, 100):
            yield f"{name} cut to {n}", _rewrite(name, partial(_first, n))
            yield f"{name} without its last {n + 1}", _rewrite(name, partial(_first, -n - 1))
        for more in (b"\0", b"}", b"x" * 4096):
            yield f"{name} longer by {len(more)}", _rewrite(name, partial(_longer, more))
        for n in (1, 64, 512, 4096, 1 << 30):
            yield f"{name} with {n} zeros at its end", _rewrite(name, partial(_zeroed, n))
        yield f"{name} gone", partial(_gone, name)
        yield f"{name} a folder", partial(_folder_for_file, name)
        yield f"{name} of the step before", partial(_of_the_step_before, name)
    yield "model and optimizer exchanged", partial(_swapped, names[1], names[2])
    yield "a whole folder under another step's name", _under_another_name
    yield "the older one's files under the newer name", _older_as_newer
    for what, edit in _EDITS.items():
        yield f"manifest: {what}", _rewrite(MANIFEST, edit)
    for what, change in _FORGED.items():
        yield f"manifest, hashed again: {what}", _forge(change)
    yield "manifest of 300 MB", _grown


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(new: Path, old: Path) -> None:
        good = (new / name).read_bytes()
        bad = change(good)
        (new / name).write_bytes(bad if bad != good else bad[:-1] + b"?")

    return damage


def _first(n: int, data: bytes) -> bytes:
    return data[:n]


def _longer(more: bytes, data: bytes) -> bytes:
    return data + more


def _zeroed(n: int, data: bytes) -> bytes:
    return data[:-n] + bytes(min(n, len(data)))


def _gone(name: str, new: Path, old: Path) -> None:
    (new / name).unlink()


def _folder_for_file(name: str, new: Path, old: Path) -> None:
    (new / name).unlink()
    (new / name).mkdir()


def _of_the_step_before(name: str, new: Path, old: Path) -> None:
    (new / name).write_bytes((old / name).read_bytes())


def _swapped(one: str, other: str, new: Path, old: Path) -> None:
    a, b = (new / one).read_bytes(), (new / other).read_bytes()
    (new / one).write_bytes(b)
    (new / other).write_bytes(a)


def _under_another_name(new: Path, old: Path) -> None:
    new.rename(new.with_name("step-00000009"))


def _older_as_newer(new: Path, old: Path) -> None:
    shutil.rmtree(new)
    shutil.copytree(old, new)


def _grown(new: Path, old: Path) -> None:
    with open(new / MANIFEST, "r+b") as file:
        file.truncate(300 << 20)


def _forge(change: Callable[[dict[str, Any]], object]) -> Damage:
    """An edit by somebody who knows how the manifest's own hash is made."""

    def damage(new: Path, old: Path) -> None:
        content = json.loads((new / MANIFEST).read_text())
        change(content)
        content["sha256"] = manifest_hash(content)
        (new / MANIFEST).write_text(json.dumps(content))

    return damage


_EDITS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "a list": lambda data: b"[]",
    "a number": lambda data: b"1",
    "null": lambda data: b"null",
    "not UTF-8": lambda data: data.replace(b"pretrain", b"pretr\xff\xfen"),
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "nested 100,000 deep": lambda data: b"[" * 100_000 + b"]" * 100_000,
    "a number of 10,000 digits": lambda data: data.replace(
        b'"step": ', b'"step": ' + b"9" * 10_000
    ),
    "a key twice": lambda data: data.replace(b'"step": ', b'"step": 9, "step": 1', 1),
    "the step twice, the right one last": lambda data: data.replace(b"{", b'{"step": 9,', 1),
    "another step": lambda data: data.replace(b'"step": 2', b'"step": 7'),
    "twice": lambda data: data + data,
    "not a number": lambda data: data.replace(b'"step": 2', b'"step": NaN'),
}
_MODEL = "model-00000.safetensors"
_FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "another step": lambda content: content.update(step=7),
    "no step": lambda content: content.pop("step"),
    "no state": lambda content: content.pop("state"),
    "no version": lambda content: content.pop("version"),
    "no files": lambda content: content.pop("files"),
    "no tensors": lambda content: content.pop("tensors"),
    "files that are a list": lambda content: content.update(files=[]),
    "a step in words": lambda content: content.update(step="two"),
    "a version in words": lambda content: content.update(version="two"),
    "a file outside the folder": lambda content: content["files"].update(
        {"../step-00000001/" + _MODEL: content["files"].pop(_MODEL)}
    ),
    "a file with no hashes": lambda content: content["files"][_MODEL].update(sha256=[]),
    "blocks of no bytes": lambda content: content["files"][_MODEL].update(block_bytes=0),
    "blocks of fewer than none": lambda content: content["files"][_MODEL].update(block_bytes=-1),
    "a file of fewer than no bytes": lambda content: content["files"][_MODEL].update(bytes=-5),
    "an unknown dtype": lambda content: content["tensors"]["model/a"].update(dtype="X9"),
    "a slice in no file": lambda content: _slice(content).update(file="none"),
    "a slice before its file": lambda content: _slice(content).update(offset=-8),
    "a slice of other dims": lambda content: _slice(content).update(box=[]),
    "a slice in words": lambda content: _slice(content).update(box="all"),
    "a shape of fewer than none": lambda content: content["tensors"]["model/a"].update(shape=[-1]),
}


def _slice(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["tensors"]["model/a"]["slices"][0]
    return found


def damage_in_every_way(scratch: Path) -> Row:
    """Each kind once; a resume must continue from the checkpoint before."""
    history, n, harmless = History(n_bytes=N_BYTES), 0, []
    template = scratch / "template"
    for step in (1, 2):
        _checkpoint(template, step, history)
    for what, damage in _damages():
        folder = scratch / "damaged"
        shutil.copytree(template, folder)
        damage(folder / "step-00000002", folder / "step-00000001")
        try:
            found, complaints = newest_good(folder)
        except Exception as error:
            raise Unrecovered(f"{what}: {type(error).__name__}: {error}") from None
        if found is not None and found.step == 2:
            harmless.append(what)
        elif found is None or found.step != 1 or len(complaints) != 1:
            raise Unrecovered(f"{what}: {found and found.step}, {complaints}")
        else:
            history.reject_wrong_numbers(found)
            n += 1
        shutil.rmtree(folder)
    if harmless:
        raise Unrecovered(f"these were not noticed: {', '.join(harmless)}")
    return Row("files cut, grown, zeroed, exchanged, edited", n, n, n, "kinds of damage, each once")
