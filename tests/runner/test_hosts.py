"""Two hosts, each with its own network and name, connected by a cable: torchrun joins them, and
they train what one host trains."""

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

from launched_runs import (
    SETTINGS,
    finish,
    is_saved,
    losses,
    saved_tensors,
    start_training,
    wait_for,
)

UNSHARE = ["unshare", "--map-root-user", "--mount", "--net", "--uts"]
TWO_HOSTS = Path(__file__).with_name("two_hosts.sh")


def can_make_networks() -> bool:
    """Return whether a user may make networks on this machine."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    add = ["ip", "link", "add", "name", "cable-1", "type", "veth", "peer", "name", "cable-2"]
    return subprocess.run([*UNSHARE, *add], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_make_networks(), reason="needs unshare and ip")


def start_on_two_hosts(cut: Path, *args: str) -> subprocess.Popen[str]:
    """Start `pretrain ARGS` in one process on each host; the cable is cut once `cut` exists."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "first:29400", "-m", "--", "pretrain", *args]
    return subprocess.Popen(
        [*UNSHARE, "sh", str(TWO_HOSTS), str(cut), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
    )


def test_two_hosts_train_what_one_trains(corpus: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start_training(corpus, one, "--parallel.processes", "2"))
    args = ["train", str(corpus), "--run", str(two), *SETTINGS]
    output = finish(start_on_two_hosts(tmp_path / "cut", *args))
    assert output.count("held-out text: ") == 3  # only rank 0 prints
    assert losses(two) == losses(one)
    assert saved_tensors(two) == saved_tensors(one)


@pytest.mark.slow
def test_doctor_checks_two_hosts(tmp_path: Path) -> None:
    output = finish(start_on_two_hosts(tmp_path / "cut", "doctor", "--json", "--device", "cpu"))
    report = json.loads(output[output.index("{") :])
    assert report["wrong"] == []
    assert report["checks"]["meeting"]["found"].startswith("2 processes on first, second")


def processes_of(run: Path) -> list[str]:
    """Return the ids of the processes with the run's path among their arguments."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(run).encode() in path.read_bytes().split(b"\0"):
                pids.append(path.parent.name)
    return pids


@pytest.mark.slow
def test_host_that_is_cut_off_is_named(corpus: Path, tmp_path: Path) -> None:
    run, cut = tmp_path / "run", tmp_path / "cut"
    args = ["train", str(corpus), "--run", str(run), *SETTINGS, "--train.steps", "4000"]
    hosts = start_on_two_hosts(cut, *args, "--parallel.timeout_seconds", "5")
    wait_for(lambda: is_saved(run, 8))
    cut.touch()
    message = "timed out after 5 seconds; no answer from ranks"
    expected = [f"rank 0 (first): {message} 1", f"rank 1 (second): {message} 0"]
    output = ""
    assert hosts.stdout is not None
    try:
        while not all(line in output for line in expected):
            line = hosts.stdout.readline()
            assert line, output
            output += line
    finally:
        os.killpg(hosts.pid, signal.SIGKILL)
    wait_for(lambda: not processes_of(run))  # the ranks that the two torchruns leave behind, too
