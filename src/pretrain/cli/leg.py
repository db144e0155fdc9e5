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

from pretrain.cli.going_on import resume
from pretrain.cli.output import Output
from pretrain.train.signals import Ends


def main(words: Sequence[str]) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--die-after", type=int)
    asked = parser.parse_args(words)
    ends = Ends(asked.stop_after, asked.die_after)
    return resume(asked.folder, None, {}, Output(json=False), began, ends=ends)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
