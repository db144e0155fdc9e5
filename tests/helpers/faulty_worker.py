"""A worker of `verify` with a fault that a resume can have.

python faulty_worker.py FAULT FOLDER --stop-after N
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pretrain import rng
from pretrain.model import dropout as random
from pretrain.selftest import verify
from pretrain.train import state
from pretrain.train.build import TrainingBatches


def order() -> None:
    """The loader skips a batch."""
    real = TrainingBatches.at
    TrainingBatches.at = lambda self, step: real(self, step + 1)  # type: ignore[method-assign]


def randomness() -> None:
    """Dropout masks come from a generator that starts again."""
    random.philox_key = lambda seed, purpose: rng.philox_key(  # type: ignore[attr-defined]
        seed + (purpose == "dropout"), purpose
    )


def optimizer() -> None:
    """One tensor of the optimizer is not restored."""
    real = state.restore_optimizer_state  # type: ignore[attr-defined]

    def forgetful(optimizer: Any, parameters: Any, tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.endswith("exp_avg"))
        real(optimizer, parameters, {**tensors, name: tensors[name] * 0})

    state.restore_optimizer_state = forgetful  # type: ignore[assignment, attr-defined]


def schedule() -> None:
    """The warm-up starts again."""
    real = state.Run.lr_at
    state.Run.lr_at = lambda run, step: real(run, step - 4)  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    fault, folder, *rest = sys.argv[1:]
    if any(Path(folder).glob("checkpoints/step-*")):
        {"order": order, "randomness": randomness, "optimizer": optimizer, "schedule": schedule}[
            fault
        ]()
    sys.exit(verify.main([folder, *rest]))
