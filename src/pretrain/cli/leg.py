"""One leg of a proof, in a process of its own: a run that goes on to a given step and stops, or
dies.

`verify` starts it as python -m pretrain.cli.leg FOLDER --stop-after N | --die-after N.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.checkpoint import RunLock
from pretrain.cli.output import Output
from pretrain.cli.train import resume
from pretrain.config import compose, read_file


def main(words: Sequence[str]) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--die-after", type=int)
    asked = parser.parse_args(words)
    config = compose([read_file(asked.folder / "config.yaml")])
    with RunLock(asked.folder):
        return resume(
            config,
            asked.folder,
            Output(json=False),
            began,
            stop_after=asked.stop_after,
            die_after=asked.die_after,
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
