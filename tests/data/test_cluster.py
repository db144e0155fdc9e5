"""Preparation with datatrove's executors gives the bytes of `prepare`, also when a worker dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from prepared import FILTERED, file_hashes, write_dirty_corpus
from pretrain.data.preparation import begin, cluster_tasks, finish, prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dirty_corpus(tmp_path_factory.mktemp("cluster") / "texts")


@pytest.fixture(scope="module")
def expected(corpus: Path) -> dict[str, str]:
    prepare(sorted(corpus.iterdir()), corpus.parent / "expected", corpus=FILTERED)
    return file_hashes(corpus.parent / "expected")


def test_any_number_of_cluster_tasks_gives_the_same_bytes(
    corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    job = begin(sorted(corpus.iterdir()), tmp_path / "out", corpus=FILTERED)
    with pytest.raises(RuntimeError, match=r"1 of 1 tasks of the stage 'list' are not finished"):
        finish(job, tmp_path / "out")
    for cluster_task in cluster_tasks(job):
        for rank in (2, 0, 1):
            cluster_task(None, rank, 3)
    finish(job, tmp_path / "out")
    assert file_hashes(tmp_path / "out") == expected


def test_the_local_executor(corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    executors = pytest.importorskip("datatrove.executor")
    job = begin(sorted(corpus.iterdir()), tmp_path / "out", corpus=FILTERED)
    executor = None
    for number, cluster_task in enumerate(cluster_tasks(job)):
        executor = executors.LocalPipelineExecutor(
            pipeline=[cluster_task],
            tasks=2,
            logging_dir=str(tmp_path / f"logs{number}"),
            depends=executor,
        )
    assert executor is not None
    executor.run()
    finish(job, tmp_path / "out")
    assert file_hashes(tmp_path / "out") == expected


def kill_one_at_work(folder: Path, killed: list[int]) -> None:
    """Kill one process that is running a task, and the Ray worker above it.

    Not a worker that is still starting: for that the executor waits without end.
    """
    while not killed:
        for path in folder.glob("[rfe]*/*.*-*"):
            process = int(path.name.partition(".")[2].partition("-")[0])
            try:
                above = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
                is_ray = b"ray::RankWorker" in Path(f"/proc/{above}/cmdline").read_bytes()
            except OSError:
                continue  # it has ended
            if is_ray:
                for each in (above, process):
                    os.kill(each, signal.SIGKILL)
                killed.append(above)
                return
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="looks at /proc")
def test_ray_with_a_worker_killed(
    corpus: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    executors = pytest.importorskip("datatrove.executor.ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    job = begin(sorted(corpus.iterdir()), tmp_path / "out", corpus=FILTERED)
    killed: list[int] = []
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000)
    try:
        killer = threading.Thread(target=kill_one_at_work, args=(job.folder, killed), daemon=True)
        killer.start()
        executor: Any = None
        for number, cluster_task in enumerate(cluster_tasks(job)):
            executor = executors.RayPipelineExecutor(
                pipeline=[cluster_task],
                tasks=2,
                workers=2,
                mem_per_cpu_gb=0.1,
                logging_dir=str(tmp_path / f"logs{number}"),
                depends=executor,
            )
        executor.run()
    finally:
        ray.shutdown()
    killer.join(timeout=5)
    assert len(killed) == 1
    finish(job, tmp_path / "out")
    assert file_hashes(tmp_path / "out") == expected


# Stand-ins for Slurm's programs: a job array runs here, one task after the other.
SLURM = {
    "sbatch": r"""
script="${@: -1}"
range=$(sed -n 's/^#SBATCH --array=\([0-9-]*\).*/\1/p' "$script")
for i in $(seq ${range%%-*} ${range##*-}); do
  SLURM_NODELIST=here SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=1 bash "$script" >&2 || exit 1
done
echo "Submitted batch job 1"
""",
    "srun": 'while [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done; exec "$@"',
    "scontrol": "echo here",
}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs bash")
def test_the_scripts_for_slurm(
    corpus: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executors = pytest.importorskip("datatrove.executor")
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = [str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    job = begin(sorted(corpus.iterdir()), tmp_path / "out", corpus=FILTERED)
    executor: Any = None
    for number, cluster_task in enumerate(cluster_tasks(job)):
        executor = executors.SlurmPipelineExecutor(
            pipeline=[cluster_task],
            tasks=2,
            time="01:00:00",
            partition="cpu",
            run_on_dependency_fail=False,
            logging_dir=str(tmp_path / f"logs{number}"),
            depends=executor,
        )
    executor.run()
    finish(job, tmp_path / "out")
    assert file_hashes(tmp_path / "out") == expected
