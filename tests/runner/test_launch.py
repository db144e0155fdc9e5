"""`pretrain train --parallel.processes 2`: equal to one process, and to itself when a process is
killed, suspended, or stopped by a signal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig

from launched_runs import (
    N_STEPS,
    SETTINGS,
    TIMEOUT_SECONDS,
    finish,
    is_dead,
    is_saved,
    losses,
    rank_pids,
    saved_tensors,
    start_command,
    start_training,
    wait_for,
)
from pretrain.runner.launch import NEW_LAUNCH_SETTINGS, launch

PRETRAIN = (sys.executable, "-m", "pretrain")
TWO = ("--parallel.processes", "2")


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two processes."""
    run = tmp_path_factory.mktemp("launched") / "run"
    output = finish(start_training(corpus, run, *TWO))
    assert "x data-parallel processes 2" in output
    assert output.count("held-out text: ") == 3  # only rank 0 prints
    return run


def test_this_torch_has_all_settings_of_its_launcher_that_are_used() -> None:
    """Names that a release lacks are ignored, and so would be a name with a typo."""
    assert NEW_LAUNCH_SETTINGS.keys() <= {field.name for field in fields(LaunchConfig)}


def test_a_launch_works_in_any_thread_and_leaves_no_handlers_or_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")
    before = [signal.getsignal(number) for number in range(1, signal.NSIG)]
    environment = {**os.environ}
    assert launch(["-c", "pass"], 1, program=()) == 0
    # Else the processes of a later torchrun would wait for each other at this one's file.
    assert {**os.environ} == environment
    assert [signal.getsignal(number) for number in range(1, signal.NSIG)] == before
    with ThreadPoolExecutor() as threads:
        assert threads.submit(launch, ["-c", "pass"], 1, program=()).result() == 0


def test_two_processes_train_what_one_trains(
    corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    finish(start_training(corpus, tmp_path / "one"))
    assert losses(uninterrupted) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    runs = (tmp_path / "one", uninterrupted)
    one, two = (json.loads((run / "summary.json").read_text()) for run in runs)
    for name in ("steps", "tokens", "parameters", "val_tokens", "val_bytes"):
        assert one[name] == two[name], name
    assert two["val_bits_per_byte"] == pytest.approx(one["val_bits_per_byte"], rel=1e-4)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_rank_is_named_and_the_run_resumes_by_itself(
    corpus: Path, uninterrupted: Path, tmp_path: Path, rank: int
) -> None:
    run = tmp_path / "run"
    launcher = start_training(corpus, run, *TWO)
    wait_for(lambda: is_saved(run, 8))
    os.kill(rank_pids(launcher)[rank], signal.SIGKILL)
    output = finish(launcher)
    assert f"rank {rank} was killed by SIGKILL" in output
    assert "Traceback" not in output
    assert losses(run) == losses(uninterrupted)
    assert saved_tensors(run) == saved_tensors(uninterrupted)


@pytest.mark.slow
def test_signal_stops_all_ranks_at_one_step_and_the_resume_is_exact(
    corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launcher = start_training(corpus, run, *TWO)
    wait_for(lambda: is_saved(run, 8))
    launcher.terminate()
    output = finish(launcher, exit_code=128 + signal.SIGTERM)
    assert "stopped and saved" in output
    assert "death signal" not in output  # a message of torch's agent
    command = [*PRETRAIN, "train", "--resume", "--run", str(run)]
    subprocess.run(command, check=True, timeout=TIMEOUT_SECONDS, capture_output=True)
    assert losses(run) == losses(uninterrupted)
    assert saved_tensors(run) == saved_tensors(uninterrupted)


@pytest.mark.slow
def test_suspended_rank_is_named(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = start_training(corpus, run, *TWO, "--parallel.timeout_seconds", "5")
    wait_for(lambda: is_saved(run, 8))
    suspended = rank_pids(launcher)[1]
    os.kill(suspended, signal.SIGSTOP)
    line = ""
    assert launcher.stdout is not None
    while "timed out after" not in line:
        line = launcher.stdout.readline()
        assert line, "it ended without a message"
    assert "timed out after 5 seconds; no answer from ranks 1" in line
    assert is_dead(suspended)
    assert f"resuming {run} after step" in finish(launcher)


def test_a_terminal_that_closes_ends_two_processes_unless_nohup_ignores_it(
    corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """LlamaFactory issue 3036 (2024): torch's launcher takes SIGHUP over, also where it is ignored.
    A shell sends the signal again after the terminal has."""
    run = tmp_path / "run"
    launcher = start_training(corpus, run, *TWO)
    wait_for(lambda: is_saved(run, 4))
    launcher.send_signal(signal.SIGHUP)
    launcher.send_signal(signal.SIGHUP)
    finish(launcher, exit_code=128 + signal.SIGHUP)
    (last,) = sorted(run.glob("checkpoints/step-*"))[-1:]
    assert len(losses(run)) == int(last.name.removeprefix("step-"))  # no step is lost

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launcher = start_training(corpus, tmp_path / "ignored", *TWO)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(lambda: is_saved(tmp_path / "ignored", 4))
    launcher.send_signal(signal.SIGHUP)
    finish(launcher)
    assert losses(tmp_path / "ignored") == losses(uninterrupted)


def test_no_rank_outlives_its_launcher(corpus: Path, tmp_path: Path) -> None:
    launcher = start_training(corpus, tmp_path / "run", *TWO)
    wait_for(lambda: is_saved(tmp_path / "run", 8))
    pids = rank_pids(launcher)
    assert len(pids) == 2
    launcher.kill()
    launcher.wait()
    wait_for(lambda: all(is_dead(pid) for pid in pids))


@pytest.mark.slow
def test_other_number_of_processes_is_a_change_to_accept(
    corpus: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.cli import main

    run = tmp_path / "run"
    sharded = ("--parallel.shard", "2", "--train.precision", "bf16")
    launcher = start_training(corpus, run, *TWO, *sharded)
    wait_for(lambda: is_saved(run, 8))
    launcher.terminate()
    finish(launcher, exit_code=128 + signal.SIGTERM)
    args = ["train", "--resume", "--run", str(run), "--parallel.processes", "1"]
    assert main(args) == 2
    assert "data 1 x parallel.shard 2 is 2, and there are 1 proc" in capsys.readouterr().err
    args += ["--parallel.shard", "1"]
    assert main(args) == 2
    assert "parallel.processes: 2 -> 1   (--accept parallel.processes)" in capsys.readouterr().err
    assert main([*args, "--accept", "parallel.processes", "--accept", "parallel.shard"]) == 0
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=1e-3)  # which is in float32


@pytest.mark.slow
def test_two_processes_extend_a_run_and_verify_it(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.cli import main

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for run in (undisturbed, killed):
        shutil.copytree(uninterrupted, run)
        launcher = start_command(*PRETRAIN, "extend", str(run), "--train.steps", "200")
        if run == killed:
            wait_for(lambda: is_saved(killed, N_STEPS + 16))
            os.kill(rank_pids(launcher)[1], signal.SIGKILL)
        output = finish(launcher)
        assert ("rank 1 was killed by SIGKILL" in output) == (run == killed)
    assert len(losses(undisturbed)) == 200
    assert losses(undisturbed) == losses(killed)
    assert saved_tensors(undisturbed, 200) == saved_tensors(killed, 200)
    capsys.readouterr()
    assert main(["verify", str(undisturbed), "--steps", "4", "--json"]) == 0
    verification = json.loads(capsys.readouterr().out)
    assert verification["verdict"] == "exact"
    assert verification["checks"]["micro-batch"]["verdict"] == "agrees"


@pytest.mark.slow
def test_error_of_all_ranks_is_reported_once(uninterrupted: Path) -> None:
    command = [*PRETRAIN, "extend", str(uninterrupted), "--train.steps", "3"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "train.steps must be more than the 24 steps" in json.loads(done.stdout)["error"]
    assert done.stderr.count("must be more than") == 1


@pytest.mark.slow
@pytest.mark.parametrize("module", ["pretrain", "torch.distributed.run"])
def test_finished_run_is_reported_once(uninterrupted: Path, module: str) -> None:
    args = ["train", "--resume", "--run", str(uninterrupted), "--json"]
    if module != "pretrain":
        args = ["--standalone", "--nproc-per-node", "2", "-m", "--", "pretrain", *args]
    done = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == N_STEPS
    assert done.stderr.count("is finished: there is nothing left to train") == 1


@pytest.mark.slow
def test_doctor_checks_whether_processes_can_train_together(tmp_path: Path) -> None:
    command = [*PRETRAIN, "doctor", "--processes", "2", "--json", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["processes"] == 2
    assert report["wrong"] == []
    assert set(report["checks"]) == {
        *("meeting", "versions", "clocks", "folder", "sums", "copies", "shards", "elastic")
    }
    assert "(tolerance 1e-09)" in report["checks"]["copies"]["found"]


@pytest.mark.slow
def test_two_torchruns_join_and_resume_after_a_killed_rank(
    corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """As on two hosts with a shared folder."""
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    command += ["-m", "--", "pretrain", "train", str(corpus), "--run", str(run), *SETTINGS]
    # Without the last variable, three of four restarts use the addresses of dead processes
    # (docs/how-to/processes.md).
    environment = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    hosts = [start_command(*command, **environment) for _ in range(2)]
    wait_for(lambda: is_saved(run, 8))
    os.kill(rank_pids(hosts[1])[0], signal.SIGKILL)
    for host in hosts:
        finish(host)
    assert losses(run) == losses(uninterrupted)
    assert saved_tensors(run) == saved_tensors(uninterrupted)
