"""Back to an earlier step, over the data that made the loss jump: nothing is deleted before there
is known to be a whole state to go back to.
"""

from __future__ import annotations

from pretrain.checkpoint import (
    Checkpoint,
    checkpoint_name,
    forget_after,
    list_checkpoints,
    open_checkpoint,
)
from pretrain.data.order import Rollback
from pretrain.train.post_mortem import FOLDER as POST_MORTEMS
from pretrain.train.run import Run
from pretrain.train.watch import MOST_ROLLBACKS


def roll_back(run: Run, first_weights: Checkpoint | None) -> None:
    """Go back to the last checkpoint that was due, and pass over the data since then."""
    run.finish_saving()
    wrong, target = run.done, _target(run)
    back = Rollback(
        target,
        # All from the first batch that will not be read again to the one that went wrong.
        run.batches.position(wrong) + 1 - run.batches.position(target),
    )
    if sum(b.step == target for b in run.batches.rollbacks) >= MOST_ROLLBACKS:
        raise ValueError(
            f"the loss jumps again and again after step {target:,}; {MOST_ROLLBACKS} rollbacks did "
            f"not help. The files in {run.folder / POST_MORTEMS} say what was read; a lower "
            "optimizer.learning_rate may help"
        )
    if run.world.is_main:
        forget_after(run.checkpoints, target)
    run.world.wait_for_main()
    if target:
        run.restore(open_checkpoint(run.checkpoints / checkpoint_name(target)))
    else:
        run.start_over(first_weights)
    run.records.cut_back(target)
    run.records.add_metrics({"kind": "rollback", "step": target, "batches": back.batches})
    run.take_up_records()
    run.screen.line(
        f"back to step {target:,}; {back.batches:,} batches of data are passed over", style="yellow"
    )


def _target(run: Run) -> int:
    """The last step whose checkpoint was due; where that could not be saved, or was not due when it
    was made, the newest there is. Nothing is forgotten before it is known to be whole."""
    every = run.settings.save_every
    assert every is not None
    due_step, found = run.done // every * every, ""
    if run.world.is_main and due_step:
        names = [path.name for path in list_checkpoints(run.checkpoints)]
        steps = [int(name.removeprefix("step-")) for name in names]
        target = due_step if due_step in steps else max(steps, default=0)
        if not target:
            raise ValueError(f"nothing is saved that {run.folder} could go back to")
        open_checkpoint(run.checkpoints / checkpoint_name(target)).verify()
        found = str(target)
    return int(run.world.broadcast_str(found) or 0) if due_step else 0
