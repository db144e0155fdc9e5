"""Several processes of one command: what they may say, and the words that start them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.output import Output
from pretrain.config import RunConfig
from pretrain.runner.launch import join_processes, launch
from pretrain.runner.request import is_started

if TYPE_CHECKING:
    from pretrain.distributed import World


class Silent(Output):
    """What all processes but the first say: nothing, but for errors."""

    def __init__(self) -> None:
        super().__init__(json=False)
        self._nowhere = open(os.devnull, "w")  # noqa: SIM115 - as long as the process

    @property
    def people(self) -> Any:
        return self._nowhere


def join(config: RunConfig, output: Output) -> tuple[World | None, Output]:
    world, _ = join_processes(config, output.people)
    return world, output if world is None or world.is_main else Silent()


def agreed_folder(world: World | None, choose: Callable[[], Path]) -> Path:
    """The folder that the first process chooses."""
    if world is None:
        return choose()
    return Path(world.broadcast_str(str(choose()) if world.is_main else ""))


def launch_train(arguments: argparse.Namespace, folder: Path, n: int, output: Output) -> int:
    """Let `n` processes do what the command says, in `folder`."""
    said = [arguments.target] * (arguments.target is not None)
    said += ["--json"] * arguments.json
    flags = ["--run", str(folder)]
    accepted = [word for each in arguments.accept for word in ("--accept", each)]
    begun = ["train", *said, *arguments.settings, *flags]
    resumed = ["train", "--resume", *flags, *["--json"] * arguments.json]
    if arguments.resume:
        begun = resumed = [*begun, "--resume", *accepted]

    def again() -> list[str]:
        return resumed if is_started(folder) else begun

    return launch(begun, again, n, output.say, progress=lambda: _saved(folder))


def launch_continuation(
    arguments: argparse.Namespace,
    verb: str,
    n: int,
    output: Output,
    *,
    is_under_way: Callable[[], bool],
) -> int:
    """Let `n` processes extend or anneal a run; once that `is_under_way` it is a run like others,
    which goes on."""
    accepted = [word for each in arguments.accept for word in ("--accept", each)]
    said = ["--json"] * arguments.json
    words = [verb, arguments.run, *arguments.settings, *accepted, *said]
    resumed = ["train", "--resume", "--run", arguments.run, *said]
    folder = Path(arguments.run)

    def again() -> list[str]:
        return resumed if is_under_way() else words

    return launch(words, again, n, output.say, progress=lambda: _saved(folder))


def _saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoints/step-*"))
