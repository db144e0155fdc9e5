"""A run's folder around its numbers: who writes into it, under what name, on what machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.output import Output
from pretrain.run import directory
from pretrain.run.directory import ENVIRONMENT, read_environment

if TYPE_CHECKING:
    from pretrain.distributed import World

__all__ = ["ENVIRONMENT", "only_writer", "read_environment", "write_environment"]


@contextmanager
def only_writer(folder: Path, output: Output) -> Iterator[None]:
    """Be the only one who writes into the run."""
    from pretrain.fileio import FileLock

    with FileLock(folder / "run.lock", action="trained") as lock:
        if lock.warning is not None:
            output.say(f"note: {lock.warning}")
        yield


def write_environment(
    folder: Path, config: str, world: World, fingerprint: Mapping[str, Any]
) -> None:
    """Write environment.json for a run of this `config`."""
    from pretrain.distributed import describe_machine

    directory.write_environment(
        folder,
        config,
        fingerprint,
        machine=describe_machine(),
        device=world.device.type,
        threads=world.threads,
    )
