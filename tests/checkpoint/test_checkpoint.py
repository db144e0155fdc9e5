"""Checkpoints: any slice of a saved tensor is read back, every kind of damage is detected, and a
crash leaves the old checkpoint."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import format as layout
from pretrain.checkpoint.format import DamagedCheckpoint
from pretrain.checkpoint.load import Checkpoint, list_checkpoints, newest_good
from pretrain.checkpoint.save import BackgroundSaver, prune, save_checkpoint


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model/a": torch.randn(7, 5, generator=generator),
        "model/b": torch.randn(3, generator=generator).bfloat16(),
        "optimizer/a/step": torch.tensor(4.0),
        "optimizer/a/exp_avg": torch.randn(7, 5, 2, generator=generator, dtype=torch.float64),
        "optimizer/n": torch.tensor([2**60], dtype=torch.int64),
    }


def save(folder: Path, step: int = 3) -> Path:
    return save_checkpoint(folder, step=step, tensors=tensors(), state={"note": "x"})


def read_all(path: Path) -> None:
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    for name in tensors():
        checkpoint.read(name)


def test_saved_tensors_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path))
    assert (checkpoint.step, checkpoint.state) == (3, {"note": "x"})
    assert checkpoint.names("model") == ["a", "b"]
    for name, tensor in tensors().items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_tensors_with_dims_of_one_are_saved_whatever_their_strides(tmp_path: Path) -> None:
    # torch 2.13.0: a transposed (1, 1) counts as contiguous with a stride of 3, and cannot be
    # viewed as bytes. A model of width 1 has such tensors.
    odd = {
        "model/one": torch.arange(9.0).reshape(3, 3)[:, :1].T[:, :1],
        "model/column": torch.arange(3.0).reshape(1, 3).T,
        "model/bf16": torch.arange(8).bfloat16().reshape(2, 4)[1:, 3:].T,
        "model/none": torch.zeros(0, 3).T,
    }
    assert odd["model/one"].is_contiguous()
    assert odd["model/one"].stride() == (1, 3)
    checkpoint = Checkpoint(save_checkpoint(tmp_path, step=3, tensors=odd, state={}))
    for name, tensor in odd.items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_the_files_are_safetensors(tmp_path: Path) -> None:
    found = load_file(save(tmp_path) / "optimizer-00000.safetensors")
    assert torch.equal(found["a/exp_avg"], tensors()["optimizer/a/exp_avg"])


def test_any_slice_of_a_tensor_can_be_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path))
    full = tensors()["optimizer/a/exp_avg"]
    bounds = ((2, 6), (1, 4), (1, 2))
    assert torch.equal(checkpoint.read("optimizer/a/exp_avg", bounds), full[2:6, 1:4, 1:2])


def test_a_tensor_may_be_stored_in_slices_of_several_files(tmp_path: Path) -> None:
    """As two processes would write it: rows 0-3 in one file, 4-6 in another."""
    path = save(tmp_path)
    full = tensors()["model/a"]
    manifest = json.loads((path / layout.MANIFEST).read_text())
    slices = []
    for number, (start, stop) in enumerate(((0, 4), (4, 7))):
        file = path / f"half-{number}.safetensors"
        shard = layout.TensorShard((7, 5), ((start, stop), (0, 5)))
        entry, records = layout.write_tensors(file, {"a": full[start:stop].clone()}, {"a": shard})
        manifest["files"][file.name] = entry
        slices += records["a"]["slices"]
    manifest["tensors"]["model/a"]["slices"] = slices
    manifest["sha256"] = layout.manifest_hash(manifest)
    (path / layout.MANIFEST).write_text(json.dumps(manifest))
    checkpoint = Checkpoint(path)
    assert torch.equal(checkpoint.read("model/a"), full)
    assert torch.equal(checkpoint.read("model/a", ((3, 6), (1, 3))), full[3:6, 1:3])
    manifest["tensors"]["model/a"]["slices"] = slices[:1]
    manifest["sha256"] = layout.manifest_hash(manifest)
    (path / layout.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match="must cover its 35 numbers"):
        Checkpoint(path).read("model/a")


def test_a_reader_checks_only_the_blocks_it_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "BLOCK_BYTES", 64)
    big = torch.arange(100, dtype=torch.float64)
    path = save_checkpoint(tmp_path, step=1, tensors={"model/x": big}, state={})
    file = path / "model-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    checkpoint = Checkpoint(path)
    assert torch.equal(checkpoint.read("model/x", ((0, 50),)), big[:50])
    with pytest.raises(DamagedCheckpoint, match="was changed after it was written"):
        checkpoint.read("model/x", ((50, 100),))


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    """One bit in each of some hundred places of every file, always including the first and the last
    byte."""
    path = save(tmp_path)
    chosen = random.Random(0)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        places = {0, len(good) - 1, *(chosen.randrange(len(good)) for _ in range(120))}
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << chosen.randrange(8)
            file.write_bytes(bad)
            if file.name == layout.MANIFEST and _same_json(good, bytes(bad)):
                continue  # white space: nothing was changed
            with pytest.raises(DamagedCheckpoint):
                read_all(path)
        file.write_bytes(good)
    read_all(path)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("change", ["cut", "longer", "gone"])
def test_a_truncated_longer_or_missing_file_is_detected_when_opened(
    tmp_path: Path, change: str
) -> None:
    path = save(tmp_path)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        if change == "gone":
            file.unlink()
        else:
            file.write_bytes(good[:-3] if change == "cut" else good + b"}")
        with pytest.raises(DamagedCheckpoint):
            Checkpoint(path)
        file.write_bytes(good)


def test_files_swapped_between_two_checkpoints_are_detected(tmp_path: Path) -> None:
    one = save(tmp_path, 1)
    other = save_checkpoint(
        tmp_path, step=2, tensors={k: v + 1 for k, v in tensors().items()}, state={}
    )
    name = "model-00000.safetensors"
    (other / name).write_bytes((one / name).read_bytes())
    with pytest.raises(DamagedCheckpoint, match="was changed after it was written"):
        read_all(other)


def test_the_newest_good_checkpoint_is_returned_and_a_damaged_one_quarantined(
    tmp_path: Path,
) -> None:
    save(tmp_path, 9)
    save(tmp_path, 10)
    newest = save(tmp_path, 100)
    # Time stamps must not matter.
    os.utime(tmp_path / "step-00000009", (2**31, 2**31))
    (newest / "model-00000.safetensors").write_bytes(b"short")
    checkpoint, errors = newest_good(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 10
    assert len(errors) == 1
    assert "model-00000.safetensors has 5 bytes" in errors[0]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
    assert list(tmp_path.glob("damaged-step-00000100-*"))


def test_a_failed_save_leaves_only_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(tmp_path, 1)
    real = os.fsync

    for failing_call in range(1, 6):
        calls = 0

        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == failing_call:  # noqa: B023 - called within this turn of the loop
                raise OSError(errno.EIO, "input/output error")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        if failing_call < 5:
            with pytest.raises(OSError, match="input/output"):
                save(tmp_path, 2)
            assert [p.name for p in tmp_path.iterdir()] == [old.name]
        monkeypatch.setattr(os, "fsync", real)
    read_all(old)


def test_leftovers_of_a_killed_save_are_never_read_and_deleted_later(tmp_path: Path) -> None:
    half = tmp_path / ".step-00000007.tmp-1-abc"
    half.mkdir()
    (half / "model-00000.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    save(tmp_path, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000008"]


def test_a_full_disk_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        total, free = 100, 10

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match="bytes, but only 10 are free") as caught:
        save(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_free_inodes_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Table:
        f_files, f_favail = 1000, 2
        f_bavail = f_blocks = f_bfree = 1 << 20
        f_frsize = 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Table)
    with pytest.raises(OSError, match="a checkpoint needs 4 inodes, but only 2 are free") as caught:
        save(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_reports_an_error_but_was_done_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may rename a folder, lose the answer, and report an error."""
    rename = os.rename

    def renames_but_fails(old: Path, new: Path) -> None:
        rename(old, new)
        raise OSError(errno.EIO, "the answer was lost")

    monkeypatch.setattr(os, "rename", renames_but_fails)
    read_all(save(tmp_path))


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    with pytest.raises(FileExistsError, match="already saved"):
        save(tmp_path, 5)
    read_all(path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_pruning_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    gone = prune(tmp_path, keep=2, protect=[tmp_path / "step-00000002"])
    assert [p.name[-1] for p in gone] == ["1", "3"]
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["2", "4", "5"]


def test_a_newer_format_is_rejected_by_version(tmp_path: Path) -> None:
    path = save(tmp_path)
    manifest = json.loads((path / layout.MANIFEST).read_text())
    manifest["version"] = 2
    manifest["sha256"] = layout.manifest_hash(manifest)
    (path / layout.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match="has format version 2; this program reads versions up to 1"
    ):
        Checkpoint(path)


def test_pruning_keeps_multiples_of_every(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 6, 7):
        save(tmp_path, step)
    prune(tmp_path, keep=2, every=3)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["3", "6", "7"]


def test_a_reader_can_continue_when_its_checkpoint_is_deleted(tmp_path: Path) -> None:
    old = Checkpoint(save(tmp_path, 1))
    for step in (2, 3):
        save(tmp_path, step)
    prune(tmp_path, keep=2)
    assert not old.path.exists()
    old.verify()
    assert torch.equal(old.read("model/a"), tensors()["model/a"])


def test_readers_of_a_run_that_saves_and_deletes_find_a_checkpoint(tmp_path: Path) -> None:
    """A model is opened again and again while a run continues, two checkpoints at a time."""
    import shutil

    from pretrain.runner.open import open_checkpoint_of

    (tmp_path / "config.yaml").write_text("{}")
    folder, read = tmp_path / "checkpoints", set()
    save(folder, 1)
    done = threading.Event()

    def save_and_prune() -> None:
        for step in range(2, 150):
            save(folder, step)
            prune(folder, keep=1)
        done.set()

    writer = threading.Thread(target=save_and_prune)
    writer.start()
    while not done.is_set():
        _, checkpoint = open_checkpoint_of(tmp_path)
        checkpoint.verify()
        read.add(checkpoint.step)
    writer.join()
    assert len(read) > 10
    (tmp_path / "summary.json").write_text(
        json.dumps({"steps": 1, "checkpoint": "checkpoints/step-00000001"})
    )
    with pytest.raises(DamagedCheckpoint):  # and no endless retry
        open_checkpoint_of(tmp_path)
    shutil.rmtree(folder)


def test_a_renamed_checkpoint_is_detected(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    path.rename(tmp_path / "step-00000006")
    with pytest.raises(DamagedCheckpoint, match="its name must be step-00000005: rename it"):
        Checkpoint(tmp_path / "step-00000006")


def test_a_background_save_has_the_tensors_of_the_moment_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training continues while a slow disk is written; later changes are not saved."""
    real, may_end = os.fsync, threading.Event()

    def slow(descriptor: int) -> None:
        assert may_end.wait(30)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    saver, live = BackgroundSaver(tmp_path / "c"), tensors()
    deleted: list[str] = []
    saver.save(step=1, tensors=live, state={}, after=lambda: deleted.append("old ones"))
    for tensor in live.values():
        tensor.mul_(0)
    assert not saver.poll()  # no error, and no waiting
    assert deleted == []
    assert list_checkpoints(tmp_path / "c") == []
    may_end.set()
    assert saver.wait()
    assert deleted == ["old ones"]
    found = Checkpoint(list_checkpoints(tmp_path / "c")[0])
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors().items())


def test_an_error_of_a_background_save_is_raised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, deleted = BackgroundSaver(tmp_path), []

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        saver.save(step=1, tensors=tensors(), state={}, after=lambda: deleted.append(1))
        with pytest.raises(OSError, match="input/output"):
            saver.wait()
    assert not saver.poll()
    assert not saver.wait()  # so no success is reported after the error
    saver.save(step=2, tensors=tensors(), state={}, after=lambda: deleted.append(2))
    saver.wait()
    assert deleted == [2]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_a_checkpoint_that_the_disk_has_not_kept_is_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read back before an older one is deleted."""
    real = os.write
    lost = bytearray(b"lost")

    def losing(descriptor: int, data: Any) -> int:
        if len(data) == 7 * 5 * 4:  # the bytes of model/a
            return real(descriptor, bytes(lost) + bytes(data)[4:])
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", losing)
    saver, deleted = BackgroundSaver(tmp_path), []
    saver.save(step=1, tensors=tensors(), state={}, after=lambda: deleted.append(1))
    with pytest.raises(OSError, match="renamed to damaged-step-00000001"):
        saver.wait()
    assert deleted == []
    assert list_checkpoints(tmp_path) == []
