"""The steps of a preparation as pipelines for datatrove's executors: local, Slurm, Ray.

The units are those of `prepare`, so the bytes are too. What is needed is a folder that all machines
see; nothing is sent between them. A share that dies may be done again, by anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.data.job import Job
from pretrain.data.steps import STEPS

Share = Callable[[Any, int, int], None]
"""Does the units of one of `world_size` tasks: datatrove calls it with (data, rank, world_size)."""


def shares(job: Job) -> list[Share]:
    """One callable for each step of a job, to be run in this order by any number of tasks, each
    step after all tasks of the one before; then `preparation.finish` is to be called."""
    return [partial(_do_share, job.folder, step.name) for step in STEPS]


def _do_share(folder: Path, name: str, _: Any, rank: int, world_size: int) -> None:
    job = Job(folder)
    (step,) = (step for step in STEPS if step.name == name)
    for unit in range(rank, step.n_units(job), world_size):
        job.do(step, unit)
