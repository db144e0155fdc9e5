"""`pretrain train --parallel.processes 2`, as a user has it: equal to one process, and to itself
when a process is killed, stopped, or told to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.launcher.api import LaunchConfig

from pretrain.checkpoint import open_checkpoint
from pretrain.runner.launch import NEW_LAUNCH_SETTINGS
from tiny import TINY

STEPS = 24
WORDS = [*TINY, "--train.steps", str(STEPS), "--train.save_every", "4", "--model.family", "fast"]
WORDS += ["--train.evaluate_every", "8", "--model.ngram_rows", "512"]
PATIENCE_SECONDS = 120


def start(corpus: Path, run: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pretrain", "train", str(corpus), "--run", str(run)]
    return subprocess.Popen(
        [*command, *WORDS, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(started: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = started.communicate(timeout=PATIENCE_SECONDS)
    assert started.returncode == code, said
    return said


def wait_for(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def members(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes of the run, by rank."""
    path = Path(f"/proc/{launcher.pid}/task")
    found = {}
    for children in path.glob("*/children"):
        for pid in map(int, children.read_text().split()):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks = [int(w.partition(b"=")[2]) for w in words if w.startswith(b"RANK=")]
            found.update(dict.fromkeys(ranks, pid))
    return [found[rank] for rank in sorted(found)]


def is_saved(run: Path, step: int) -> bool:
    return (run / f"checkpoints/step-{step:08d}").is_dir()


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def numbers(run: Path, step: int = STEPS) -> dict[str, Any]:
    checkpoint = open_checkpoint(run / f"checkpoints/step-{step:08d}")
    names = [f"{g}/{n}" for g in ("model", "optimizer") for n in checkpoint.names(g)]
    return {name: checkpoint.read(name).tolist() for name in names}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbs."""
    run = tmp_path_factory.mktemp("launched") / "whole"
    said = finish(start(corpus, run, "--parallel.processes", "2"))
    assert "x processes 2" in said
    assert said.count("held-out text: ") == 3  # one process speaks
    return run


def test_this_release_of_torch_has_all_that_is_asked_of_its_launcher() -> None:
    """What one lacks is left out without a word, and so would be a name with a mistake."""
    assert NEW_LAUNCH_SETTINGS.keys() <= {field.name for field in fields(LaunchConfig)}


def test_two_processes_are_one_run(corpus: Path, whole: Path, tmp_path: Path) -> None:
    finish(start(corpus, tmp_path / "one"))
    assert losses(whole) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = (json.loads((r / "summary.json").read_text()) for r in (tmp_path / "one", whole))
    for name in ("steps", "tokens", "parameters", "val_tokens", "val_bytes"):
        assert one[name] == two[name]
    assert two["val_bits_per_byte"] == pytest.approx(one["val_bits_per_byte"], rel=1e-4)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_is_named_and_the_run_goes_on_by_itself(
    corpus: Path, whole: Path, tmp_path: Path, rank: int
) -> None:
    started = start(corpus, tmp_path / "run", "--parallel.processes", "2")
    wait_for(lambda: is_saved(tmp_path / "run", 8))
    os.kill(members(started)[rank], signal.SIGKILL)
    said = finish(started)
    assert f"rank {rank} was killed by SIGKILL" in said
    assert "Traceback" not in said
    assert losses(tmp_path / "run") == losses(whole)
    assert numbers(tmp_path / "run") == numbers(whole)


@pytest.mark.slow
def test_a_signal_ends_all_processes_at_one_step_and_the_resume_is_exact(
    corpus: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = start(corpus, run, "--parallel.processes", "2")
    wait_for(lambda: is_saved(run, 8))
    started.terminate()
    said = finish(started, code=128 + signal.SIGTERM)
    assert "stopped and saved" in said
    assert "death signal" not in said  # as torch's agent would put it
    command = [sys.executable, "-m", "pretrain", "train", "--resume", "--run", str(run)]
    subprocess.run(command, check=True, timeout=PATIENCE_SECONDS, capture_output=True)
    assert losses(run) == losses(whole)
    assert numbers(run) == numbers(whole)


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_named(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--parallel.processes", "2", "--parallel.timeout_seconds", "5"]
    started = start(corpus, run, *words)
    wait_for(lambda: is_saved(run, 8))
    stopped = members(started)[1]
    os.kill(stopped, signal.SIGSTOP)
    line = ""
    assert started.stdout is not None
    while "timed out after" not in line:
        line = started.stdout.readline()
        assert line, "it ended without a word"
    assert "timed out after 5 seconds; no answer from ranks 1" in line
    assert _is_dead(stopped)
    assert f"resuming {run} after step" in finish(started)


def test_no_process_outlives_its_launcher(corpus: Path, tmp_path: Path) -> None:
    started = start(corpus, tmp_path / "run", "--parallel.processes", "2")
    wait_for(lambda: is_saved(tmp_path / "run", 8))
    pids = members(started)
    assert len(pids) == 2
    started.kill()
    started.wait()
    wait_for(lambda: all(_is_dead(pid) for pid in pids))


def _is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes_once_that_is_accepted(
    corpus: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.cli import main

    run = tmp_path / "run"
    words = ["--parallel.processes", "2", "--parallel.shard", "2", "--train.precision", "bf16"]
    started = start(corpus, run, *words)
    wait_for(lambda: is_saved(run, 8))
    started.terminate()
    finish(started, code=128 + signal.SIGTERM)
    words = ["train", "--resume", "--run", str(run), "--parallel.processes", "1"]
    assert main(words) == 2
    assert "data 1 x parallel.shard 2 is 2, and there are 1 proc" in capsys.readouterr().err
    words += ["--parallel.shard", "1"]
    assert main(words) == 2
    assert "parallel.processes: 2 -> 1   (--accept parallel.processes)" in capsys.readouterr().err
    assert main([*words, "--accept", "parallel.processes", "--accept", "parallel.shard"]) == 0
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)  # which is in float32


@pytest.mark.slow
def test_two_processes_extend_a_run_and_prove_it(
    corpus: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.cli import main

    command = [sys.executable, "-m", "pretrain", "extend", "RUN", "--train.steps", "200"]
    one, two = tmp_path / "undisturbed", tmp_path / "killed"
    for run in (one, two):
        shutil.copytree(whole, run)
        command[4] = str(run)
        started = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if run == two:
            wait_for(lambda: is_saved(two, STEPS + 16))
            os.kill(members(started)[1], signal.SIGKILL)
        said = finish(started)
        assert ("rank 1 was killed by SIGKILL" in said) == (run == two)
    assert len(losses(one)) == 200
    assert losses(one) == losses(two)
    assert numbers(one, 200) == numbers(two, 200)
    capsys.readouterr()
    assert main(["verify", str(one), "--steps", "4", "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["verdict"] == "exact"
    assert proof["checks"]["micro-batch"]["verdict"] == "agrees"


@pytest.mark.slow
def test_a_program_is_told_once_what_was_wrong(whole: Path) -> None:
    command = [sys.executable, "-m", "pretrain", "extend", str(whole), "--train.steps", "3"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "train.steps 3 is not more than" in json.loads(done.stdout)["error"]
    assert done.stderr.count("is not more than") == 1


@pytest.mark.slow
@pytest.mark.parametrize("module", ["pretrain", "torch.distributed.run"])
def test_a_finished_run_says_so_once(whole: Path, module: str) -> None:
    words = ["train", "--resume", "--run", str(whole), "--json"]
    if module != "pretrain":
        words = ["--standalone", "--nproc-per-node", "2", "-m", "--", "pretrain", *words]
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == STEPS
    assert done.stderr.count("is finished: there is nothing left to train") == 1


@pytest.mark.slow
def test_the_doctor_sees_whether_processes_can_train_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pretrain", "doctor", "--processes", "2", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--device", "cpu"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["processes"] == 2
    assert found["wrong"] == []
    assert set(found["checks"]) == {
        *("meeting", "versions", "clocks", "folder", "sums", "copies", "shards", "elastic")
    }
    assert "(legal 1e-09)" in found["checks"]["copies"]["found"]


@pytest.mark.slow
def test_two_torchruns_meet_and_go_on_after_a_death(
    corpus: Path, whole: Path, tmp_path: Path
) -> None:
    """As on two hosts, which share a folder."""
    run, port = tmp_path / "run", free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    command += ["-m", "--", "pretrain", "train", str(corpus), "--run", str(run), *WORDS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    # Else three restarts of four meet at the addresses of the dead (docs/how-to/processes.md).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    hosts = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        for _ in range(2)
    ]
    wait_for(lambda: is_saved(run, 8))
    os.kill(members(hosts[1])[0], signal.SIGKILL)
    for host in hosts:
        finish(host)
    assert losses(run) == losses(whole)
    assert numbers(run) == numbers(whole)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
