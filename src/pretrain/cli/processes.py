"""Several processes of one run: started on this machine, met, and brought up again when one dies.

`launch` has them started by torch's elastic agent (torchrun's own), which ends all when one dies.
Across machines torchrun itself does that, and only `join` is called. Only the first process writes
files and speaks; the others' words are in the last error where one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.output import Output
from pretrain.cli.places import ASKED, is_begun
from pretrain.config import Layer, RunConfig, compose, read_file
from pretrain.distributed import MEETING_FILE, memory_bytes, n_processes
from pretrain.parallel.peers import NO_ANSWER, PeerDied

if TYPE_CHECKING:
    from pretrain.distributed import World

# Restarts in a row without a new checkpoint: what fails so often fails always.
MOST_RESTARTS = 3
# What a process holds before it has a model.
BYTES_OF_PROCESS = 300_000_000
# How gloo and NCCL say that a process of the run is not there.
_LOST = re.compile(r"gloo|NCCL|[Cc]onnection|[Tt]imed out")


class Silent(Output):
    """What all processes but the first say: nothing, but for errors."""

    def __init__(self) -> None:
        super().__init__(json=False)
        self._nowhere = open(os.devnull, "w")  # noqa: SIM115 - as long as the process

    @property
    def people(self) -> Any:
        return self._nowhere


def must_launch(config: RunConfig) -> bool:
    """Whether this process is to start others, and not one that was started."""
    return config.parallel.processes > 1 and n_processes() == 1


def join(config: RunConfig, output: Output) -> tuple[World | None, Output]:
    """Meet the other processes, if there are any; and what this one may say."""
    if n_processes() == 1:
        return None, output
    _die_with_parent()
    world = opened_world(config)
    return world, output if world.leads else Silent()


def opened_world(config: RunConfig) -> World:
    """The world that a run's settings ask for."""
    from pretrain.distributed import open_world

    train = config.train
    return open_world(
        train.device,
        threads=train.threads,
        deterministic=train.deterministic,
        timeout_seconds=config.parallel.timeout_seconds,
    )


@contextmanager
def losing_others(world: World, waited: float) -> Iterator[None]:
    """PeerDied, in a sentence, where another process has gone or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not _LOST.search(str(error)):
            raise
        text = f"process {world.rank} on {platform.node()} waits for the others in vain"
        if "imed out" in str(error) and (missing := world.missing()):
            text += f": after {waited:g} seconds {NO_ANSWER} {missing}"
        raise PeerDied(text, 1) from None


def refuse_differences(world: World, facts: Mapping[str, Any]) -> None:
    """ValueError where processes would not compute the same, with what differs."""
    told = [json.loads(text) for text in world.gather_texts(json.dumps(dict(facts), default=str))]
    for rank, other in enumerate(told):
        names = [n for n in sorted({*told[0], *other}) if told[0].get(n) != other.get(n)]
        if names:
            shown = "; ".join(f"{n}: {told[0].get(n)} and {other.get(n)}" for n in names)
            raise ValueError(f"process 0 and process {rank} differ, and must not: {shown}")


def agreed_folder(world: World | None, choose: Callable[[], Path]) -> Path:
    """The folder that the first process chooses."""
    if world is None:
        return choose()
    return Path(world.share(str(choose()) if world.leads else ""))


def processes_of_run(folder: Path, overrides: Layer) -> int:
    """How many processes a run that goes on is to be started in, here."""
    if n_processes() > 1:
        return 1
    names = [name for name in ("config.yaml", ASKED) if (folder / name).is_file()]
    # No more than this number: whether the rest goes with the model is for who knows both.
    layers = [read_file(folder / names[0]) if names else {}, overrides]
    sections = [each.get("parallel") for each in layers]
    said = [s["processes"] for s in sections if isinstance(s, Mapping) and "processes" in s]
    return compose([{"parallel": {"processes": n}} for n in said]).parallel.processes


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
        return resumed if is_begun(folder) else begun

    return launch(begun, again, n, output, progress=lambda: _saved(folder))


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

    return launch(words, again, n, output, progress=lambda: _saved(folder))


def _saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoints/step-*"))


def launch(
    words: Sequence[str],
    again: Callable[[], Sequence[str]],
    n: int,
    output: Output,
    *,
    progress: Callable[[], Any],
) -> int:
    """Run `pretrain WORDS` in `n` processes of this machine, and what is to be said `again` when
    one was killed; returns an exit code. PeerDied when one fails otherwise, or too often: so many
    times without another `progress`."""
    failures, before = 0, progress()
    while True:
        try:
            return launch_once(words, n)
        except PeerDied as error:
            now = progress()
            failures, before = (1, now) if now != before else (failures + 1, now)
            if error.exit_code != 1 or failures > MOST_RESTARTS:
                raise
            output.say(f"{error}\nall processes were ended, and start again")
            words = again()


def launch_once(words: Sequence[str], n: int, *, module: str = "pretrain") -> int:
    """Run `python -m MODULE WORDS` in `n` processes of this machine; returns an exit code. PeerDied
    when one fails."""
    from pretrain.parallel.launch import run_processes

    n_bytes = memory_bytes()
    if n_bytes is not None and n * BYTES_OF_PROCESS > n_bytes:
        raise ValueError(
            f"{n:,} processes do not fit this machine, which has {n_bytes / 1e9:,.0f} GB of "
            f"memory; legal: up to {n_bytes // BYTES_OF_PROCESS}"
        )
    with tempfile.TemporaryDirectory(prefix="pretrain-") as folder:
        os.environ[MEETING_FILE] = f"{folder}/meeting"
        # No socket of this run is open to the network: agent and processes meet at files.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return run_processes([sys.executable, "-m", module, *words], n, Path(folder))


def tell_launcher(reason: str) -> bool:
    """Leave word why this process fails, for the one that has started it to say; whether there is
    one."""
    met, rank = os.environ.get(MEETING_FILE), os.environ.get("RANK")
    if met is None or rank is None:
        return False
    Path(f"{met}.{rank}").write_text(reason, encoding="utf-8")
    return True


def _die_with_parent() -> None:
    """Be killed when torch's agent is, ours or torchrun's: nobody would end a process that waits
    for others."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    import ctypes

    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
