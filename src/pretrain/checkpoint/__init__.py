"""State <-> files, in a format of slices that does not depend on how many processes wrote it.

`format` holds the layout, `save` writes so that a crash leaves the old or the new checkpoint and
never neither; `load` finds the newest good one and hands out verified tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.checkpoint.format import Place
    from pretrain.checkpoint.load import (
        Checkpoint,
        DamagedCheckpoint,
        list_checkpoints,
        newest_good,
        open_checkpoint,
    )
    from pretrain.checkpoint.save import (
        BackgroundSaver,
        checkpoint_name,
        forget_after,
        prune,
        save_checkpoint,
    )

__getattr__ = lazily(
    __name__,
    format="Place",
    load="Checkpoint DamagedCheckpoint list_checkpoints newest_good open_checkpoint",
    save="BackgroundSaver checkpoint_name forget_after prune save_checkpoint",
)
__all__ = [
    "BackgroundSaver",
    "Checkpoint",
    "DamagedCheckpoint",
    "Place",
    "checkpoint_name",
    "forget_after",
    "list_checkpoints",
    "newest_good",
    "open_checkpoint",
    "prune",
    "save_checkpoint",
]
