"""Checkpoints whose every number is known, and a check of what a resume would find in a folder.

All parts use one check, so that "survived" has one meaning: `newest_good` returns a permitted step,
each of its numbers is the saved one, no incomplete folder has the name of a checkpoint, and all
checkpoints that must be there are complete.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from faults.table import Unrecovered
from pretrain.checkpoint.format import DamagedCheckpoint
from pretrain.checkpoint.load import Checkpoint, list_checkpoints, newest_good
from pretrain.checkpoint.save import save_checkpoint as save

KEEP = 2
GROUPS = ("extra", "model", "optimizer")


class History:
    """Tensors of three groups, hence four files a checkpoint, as a function of the step."""

    def __init__(self, *, n_bytes: int) -> None:
        each = max(4, n_bytes // 4 // (2 * len(GROUPS)))
        generator = torch.Generator().manual_seed(0)
        self._first = {
            f"{group}/{name}": torch.randn(each, generator=generator)
            for group in GROUPS
            for name in ("a", "b")
        }

    def tensors(self, step: int) -> dict[str, Tensor]:
        return {name: tensor * (step + 1) for name, tensor in self._first.items()}

    def state(self, step: int) -> dict[str, int]:
        return {"position": step}

    def begin(self, folder: Path, steps: Collection[int]) -> None:
        """Save checkpoints one after another. Their times decrease, as after a clock was set back:
        no order may depend on them."""
        for step in steps:
            path = save(folder, step=step, tensors=self.tensors(step), state=self.state(step))
            os.utime(path, (4e9 - step, 4e9 - step))

    def reject_wrong_numbers(self, checkpoint: Checkpoint) -> None:
        step, expected = checkpoint.step, self.tensors(checkpoint.step)
        if checkpoint.state != self.state(step):
            raise Unrecovered(f"{checkpoint.path} has the state {checkpoint.state}")
        for name, tensor in expected.items():
            if not torch.equal(checkpoint.read(name), tensor):
                raise Unrecovered(f"{checkpoint.path}: {name} is not what was saved")


def check_folder(
    folder: Path,
    history: History,
    *,
    allowed: Collection[int],
    min_complete: int = 1,
    every_byte: bool = True,
) -> int:
    """The step that a resume would continue from; Unrecovered if it is not in `allowed`, if fewer
    than `min_complete` checkpoints are complete, or if anything else is wrong. Without `every_byte`
    only names and sizes of the checkpoints below the newest are checked."""
    names = list_checkpoints(folder)
    for path in names[:-1]:
        try:
            older = Checkpoint(path)
            if every_byte:
                older.verify()
        except DamagedCheckpoint as error:
            raise Unrecovered(f"an incomplete checkpoint has a final name: {error}") from None
    found, complaints = newest_good(folder)
    if complaints:
        raise Unrecovered(f"an incomplete checkpoint has a final name: {complaints}")
    step = None if found is None else found.step
    if found is None or step not in allowed:
        raise Unrecovered(f"step {step} is found in {folder}, and may be one of {sorted(allowed)}")
    history.reject_wrong_numbers(found)
    if len(names) < min_complete:
        raise Unrecovered(
            f"{len(names)} whole checkpoints are left, at least {min_complete} must be"
        )
    return found.step
