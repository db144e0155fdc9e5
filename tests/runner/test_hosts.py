"""Two hosts, each with a network and a name of its own, between them a cable: torchrun meets over
it, and what is trained there is what one host trains."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from test_launch import WORDS, finish, is_saved, losses, numbers, wait_for, whole

__all__ = ["whole"]

APART = ["unshare", "--map-root-user", "--mount", "--net", "--uts"]
TWO_HOSTS = Path(__file__).with_name("two_hosts.sh")


def can_be_apart() -> bool:
    """Whether this machine lets its users make networks."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    add = ["ip", "link", "add", "name", "cable-1", "type", "veth", "peer", "name", "cable-2"]
    return subprocess.run([*APART, *add], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_be_apart(), reason="no networks can be made here")


def start(cut: Path, *words: str) -> subprocess.Popen[str]:
    """`pretrain WORDS` by one process on each host."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "first:29400", "-m", "--", "pretrain", *words]
    return subprocess.Popen(
        [*APART, "sh", str(TWO_HOSTS), str(cut), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


def test_two_hosts_train_what_one_does(corpus: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = finish(start(tmp_path / "cut", "train", str(corpus), "--run", str(run), *WORDS))
    assert said.count("held-out text: ") == 3  # one process speaks
    assert losses(run) == losses(whole)
    assert numbers(run) == numbers(whole)


@pytest.mark.slow
def test_the_doctor_looks_at_two_hosts(tmp_path: Path) -> None:
    said = finish(start(tmp_path / "cut", "doctor", "--json", "--device", "cpu"))
    found = json.loads(said[said.index("{") :])
    assert found["wrong"] == []
    assert found["checks"]["meeting"]["found"].startswith("2 processes on first, second")


def running(run: Path) -> list[str]:
    """The processes that work on a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found += [path.parent.name] * (str(run).encode() in path.read_bytes().split(b"\0"))
    return found


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_named(corpus: Path, tmp_path: Path) -> None:
    run, cut = tmp_path / "run", tmp_path / "cut"
    words = ["train", str(corpus), "--run", str(run), *WORDS, "--train.steps", "4000"]
    started = start(cut, *words, "--parallel.timeout_seconds", "5")
    wait_for(lambda: is_saved(run, 8))
    cut.touch()
    said, told = "", "timed out after 5 seconds; no answer from ranks"
    assert started.stdout is not None
    try:
        while any(f"{name}: {told}" not in said for name in ("rank 0 (first)", "rank 1 (second)")):
            line = started.stdout.readline()
            assert line, said
            said += line
    finally:
        os.killpg(started.pid, signal.SIGKILL)
    wait_for(lambda: not running(run))  # those that two torchruns have left behind, too
