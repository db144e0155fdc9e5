"""Check this machine in about a minute: disk, repeated training, micro-batches, compiler, resume;
or several processes: that they connect, agree, and compute what one process does.

pretrain doctor
pretrain doctor --processes 4                                          on this machine
torchrun --nnodes 2 --nproc-per-node 8 ... -m pretrain doctor          on each of two
"""

from __future__ import annotations

import argparse

from pretrain.cli.options import DEVICE, option
from pretrain.cli.output import Output
from pretrain.machine import n_processes
from pretrain.runner.launch import launch

OPTIONS = (DEVICE, option("--processes N", "number of processes to start", 1, least=1))


def run(args: argparse.Namespace, output: Output) -> int:
    from pretrain.selftest.doctor import check_machine, check_processes

    if n_processes() > 1:
        result = check_processes(args.device, output.log)
    elif args.processes > 1:
        command = ["doctor", "--device", args.device]
        if args.json:
            command.append("--json")
        return launch(command, args.processes)
    else:
        result = check_machine(args.device, output.log)
    if result is None:  # rank 0 reports
        return 0
    output.result(result)
    return 1 if result["wrong"] else 0
