"""Verify that a resume of a run equals an uninterrupted run, bit for bit, on this machine.

pretrain verify runs/english-1

One run trains 2 K steps with the settings of RUN without interruption. A second run is killed by
SIGKILL between steps K and 2 K, and resumed from the checkpoint. Batches, losses, weights,
optimizer state, evaluations and samples are compared. A third run, in float32, has another
micro-batch size. The verdict is written to RUN/verification.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.cli.options import RUN, option
from pretrain.cli.output import Output
from pretrain.selftest import DIFFERS

OPTIONS = (RUN, option("--steps K", "steps of each half", 10))


def run(args: argparse.Namespace, output: Output) -> int:
    from pretrain.selftest.verify import verify

    result = verify(Path(args.run), args.steps, output.log)
    output.result(result)
    return 1 if result["verdict"] == DIFFERS else 0
