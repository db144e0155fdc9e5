"""State <-> files, in a format of slices that does not depend on how many processes wrote it.

`format` has the layout, `save` writes so that a crash leaves the old or the new checkpoint and
never neither, `load` finds the newest good one and returns verified tensors, and `retention`
deletes old ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.checkpoint.format import DamagedCheckpoint, TensorShard
    from pretrain.checkpoint.load import (
        Checkpoint,
        checkpoint_name,
        list_checkpoints,
        newest_good,
        open_checkpoint,
    )
    from pretrain.checkpoint.retention import delete_after, prune
    from pretrain.checkpoint.save import BackgroundSaver, save_checkpoint

__getattr__ = lazily(
    __name__,
    format="DamagedCheckpoint TensorShard",
    load="Checkpoint checkpoint_name list_checkpoints newest_good open_checkpoint",
    retention="delete_after prune",
    save="BackgroundSaver save_checkpoint",
)
__all__ = [
    "BackgroundSaver",
    "Checkpoint",
    "DamagedCheckpoint",
    "TensorShard",
    "checkpoint_name",
    "delete_after",
    "list_checkpoints",
    "newest_good",
    "open_checkpoint",
    "prune",
    "save_checkpoint",
]
