"""One leg of a proof, in as many processes as its run has: it goes on to a given step and stops,
or dies.

`verify` starts it as python -m pretrain.cli.leg FOLDER --stop-after N | --kill-after N.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.runner.launch import ProcessFailed, launch_once, n_processes_of_run
from pretrain.runner.start import Request, start
from pretrain.train.signals import PlannedStop


def main(words: Sequence[str]) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--kill-after", type=int)
    asked = parser.parse_args(words)
    if (n := n_processes_of_run(asked.folder, {})) > 1:
        try:
            return launch_once(words, n, module="pretrain.cli.leg")
        except ProcessFailed as error:
            if asked.kill_after is None or error.signal != signal.SIGKILL:
                print(error, file=sys.stderr)
                return error.exit_code
            os.kill(os.getpid(), signal.SIGKILL)  # as those that it has started did
    request = Request(
        kind="resume",
        folder=asked.folder,
        planned_stop=PlannedStop(asked.stop_after, asked.kill_after),
        start_time=began,
    )
    return start(request, sys.stdout).exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
