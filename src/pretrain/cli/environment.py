"""A run's folder around its numbers: who writes into it, under what name, on what machine."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.output import Output
from pretrain.train.records import read_json, write_json

if TYPE_CHECKING:
    from pretrain.distributed import World

ENVIRONMENT = "environment.json"


@contextmanager
def only_writer(folder: Path, output: Output) -> Iterator[None]:
    """Be the only one who writes into the run."""
    from pretrain.fileio import FileLock

    with FileLock(folder / "run.lock", action="trained") as lock:
        if lock.warning is not None:
            output.say(f"note: {lock.warning}")
        yield


def read_environment(folder: Path) -> dict[str, Any]:
    """What a run wrote down of itself and its surroundings when it began."""
    content = read_json(folder / ENVIRONMENT)
    if not isinstance(content.get("fingerprint"), dict) or "run" not in content:
        raise ValueError(f"{folder / ENVIRONMENT} is damaged: it lacks run or fingerprint")
    return content


def write_environment(
    folder: Path, config: str, world: World, fingerprint: Mapping[str, Any]
) -> None:
    """Write environment.json for a run of this `config`."""
    from pretrain import __version__
    from pretrain.distributed import describe_machine

    # Runs of one name are one run: the same settings and surroundings give the same numbers.
    named = config + json.dumps(fingerprint, sort_keys=True)
    write_json(
        folder / ENVIRONMENT,
        {
            "run": hashlib.sha256(named.encode()).hexdigest()[:16],
            "pretrain": __version__,
            **describe_machine(),
            "device": world.device.type,
            "threads": world.threads,
            "git": _git_revision(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": shlex.join(["pretrain", *sys.argv[1:]]),
            "fingerprint": fingerprint,
        },
    )


def _git_revision() -> str | None:
    """The revision of the code that runs, when it runs from a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
