"""Train a run of `verify` until a step, and stop there or be killed.

`verify` starts it as python -m pretrain.selftest.worker FOLDER --stop-after N | --kill-after N. It
launches the processes that the run's config requests.
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


def main(args: Sequence[str]) -> int:
    start_time = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--kill-after", type=int)
    options = parser.parse_args(args)

    n_processes = n_processes_of_run(options.folder, {})
    if n_processes > 1:
        try:
            return launch_once(args, n_processes, module="pretrain.selftest.worker")
        except ProcessFailed as error:
            if options.kill_after is None or error.signal != signal.SIGKILL:
                print(error, file=sys.stderr)
                return error.exit_code
            os.kill(os.getpid(), signal.SIGKILL)  # like the processes that it launched
    request = Request(
        kind="resume",
        folder=options.folder,
        planned_stop=PlannedStop(options.stop_after, options.kill_after),
        start_time=start_time,
    )
    return start(request, sys.stdout).exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
