"""A preparation that was killed at any moment gives the same bytes when the command is repeated."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from prepared import FILTERED, file_hashes, read_everything, write_dirty_corpus
from pretrain import fileio
from pretrain.cli import main
from pretrain.corpus.config import CorpusConfig
from pretrain.corpus.documents import Document
from pretrain.data import jobs, preparation, stages
from pretrain.data.jobs import Job, Stage
from pretrain.data.preparation import begin, prepare, work_folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dirty_corpus(tmp_path_factory.mktemp("kill") / "texts")


@pytest.fixture(autouse=True)
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SHARD_TEXT_BYTES", 40_000)


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "SHARD_TEXT_BYTES", 40_000)
        prepare(corpus, corpus.parent / "uninterrupted", corpus=FILTERED)
    hashes = file_hashes(corpus.parent / "uninterrupted")
    assert len(hashes) == 11
    return hashes


class Killed(BaseException):
    """Not an Exception: no `except` of the package catches it."""


def test_a_preparation_may_be_killed_after_any_task(
    corpus: Path, uninterrupted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_task = Job.run_task
    n_done = n_left = 0

    def counted(job: Job, stage: Stage, task: int) -> None:
        nonlocal n_done, n_left
        if n_left == 0:
            raise Killed
        n_left -= 1
        n_done += 1
        run_task(job, stage, task)

    n_stops = 0
    draw = random.Random(1)
    monkeypatch.setattr(Job, "run_task", counted)
    while not (tmp_path / "out").exists():
        n_left = draw.randint(0, 3)
        try:
            prepare(corpus, tmp_path / "out", corpus=FILTERED)
        except Killed:
            n_stops += 1
            assert work_folder(tmp_path / "out").is_dir()
    assert file_hashes(tmp_path / "out") == uninterrupted
    assert n_stops > 10
    # No task was run twice, and nothing is left behind.
    first = n_done
    n_left = 10**6
    prepare(corpus, tmp_path / "again", corpus=FILTERED)
    assert n_done == 2 * first
    assert {path.name for path in tmp_path.iterdir()} == {"out", "again"}


def test_a_kill_while_the_job_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, discard, n_left = os.unlink, jobs.discard, 3

    def dies(*given: Any, **named: Any) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise Killed
        real(*given, **named)

    def dying(folder: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", dies)
            discard(folder)

    texts, out = tmp_path / "a.jsonl", tmp_path / "out"
    texts.write_text("".join(f'{{"text": "A whale is number {n}."}}\n' * 2 for n in range(40)))
    begun = begin(texts, out, tokenizer="bytes")
    for stage in stages.STAGES[:3]:
        begun.run_task(stage, 0)
    with pytest.raises(Killed):
        dying(begun.folder)  # as with other settings
    read_everything(prepare(texts, out, tokenizer="bytes"))

    shutil.rmtree(out)
    n_left = 3
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "discard", dying)
        with pytest.raises(Killed):
            prepare(texts, out, tokenizer="bytes")
    with pytest.raises(FileExistsError):
        prepare(texts, out, tokenizer="bytes")
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out"}


@pytest.mark.slow
def test_a_kill_inside_a_task(
    corpus: Path, uninterrupted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With files half written, during the final rename, and while the job is removed."""
    draw = random.Random(2)
    n_calls = 0
    stopped_in: set[str] = set()

    def mortal(name: str, real: Any) -> Any:
        def dies(*given: Any, **named: Any) -> Any:
            nonlocal n_calls
            n_calls -= 1
            if n_calls < 0:
                if n_calls == -1:
                    stopped_in.add(name)
                raise Killed
            # The last file may be truncated.
            if n_calls == 0 and name == "write_json":
                given[0].write_text("{")
                raise Killed
            return real(*given, **named)

        return dies

    for module, name in (
        (stages, "write_json"),
        (jobs, "sync_tree"),
        (fileio, "sync_folder"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(module, name, mortal(name, getattr(module, name)))
    for number in range(6):
        out = tmp_path / str(number)
        while not out.exists() or work_folder(out).exists():
            n_calls = draw.choice([draw.randint(1, 12), draw.randint(1, 200)])
            try:
                prepare(corpus, out, corpus=FILTERED)
            except Killed:
                pass
        assert file_hashes(out) == uninterrupted
    assert len(stopped_in) >= 3, stopped_in
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".trash"}
    assert left == {str(number) for number in range(6)}


def test_other_settings_start_from_scratch(
    corpus: Path, uninterrupted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stages, "choose_split", dies)
        with pytest.raises(Killed):
            prepare(corpus, tmp_path / "out", corpus=CorpusConfig(deduplicate="none"))
    work = work_folder(tmp_path / "out")
    assert (work / "read").is_dir()
    prepare(corpus, tmp_path / "out", corpus=FILTERED)
    assert file_hashes(tmp_path / "out") == uninterrupted


def test_a_rejected_preparation_keeps_the_job_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise Killed

    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("the sea was calm. " * 200, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "compression_of", dies)
        with pytest.raises(Killed):
            prepare(text, out, tokenizer="bytes")
    job = file_hashes(work_folder(out))
    assert job
    out.mkdir()
    (out / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        prepare(text, out, tokenizer="characters")
    assert file_hashes(work_folder(out)) == job


def test_the_tokenizer_of_a_stopped_preparation_is_not_used_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise Killed

    (tmp_path / "a.txt").write_text("the sea was calm. " * 200, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "compression_of", dies)
        with pytest.raises(Killed):
            prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="bytes")
    data = prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="characters")
    assert data.tokenizer().decode(data.split("train").read(1, 17)) == "the sea was calm"


def test_a_worker_that_dies_is_reported_and_nothing_is_lost(
    corpus: Path, uninterrupted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill_one() -> None:
        seen: list[int] = []
        while not seen:
            seen = [p.pid for p in multiprocessing.active_children() if p.pid is not None]
            time.sleep(0.01)
        os.kill(seen[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    args = ["prepare", str(corpus), "--out", str(tmp_path / "out"), "--workers", "2"]
    args += ["--deduplicate", "near", "--filters", "gopher"]
    assert main(args) == 75
    killer.join()
    assert "a worker was killed while " in capsys.readouterr().err
    assert (work_folder(tmp_path / "out") / "read").is_dir()
    assert main(args) == 0
    assert file_hashes(tmp_path / "out") == uninterrupted


def kill_at_random(corpus: Path, folder: Path, n_kills: int, seed: int) -> None:
    """Kill a preparation with two workers `n_kills` times in total, over several runs."""
    code = (
        "import sys; from pretrain.data import jobs;"
        "jobs.SHARD_TEXT_BYTES = 40_000;"
        "from pretrain.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    draw = random.Random(seed)
    expected: dict[str, str] | None = None
    n_killed = n_finished = 0
    seconds = 5.0
    while n_killed < n_kills:
        out = folder / f"out{n_finished}"
        args = ["prepare", str(corpus), "--out", str(out), "--workers", "2"]
        args += ["--deduplicate", "near", "--filters", "gopher", "--vocab-size", "600"]
        if expected is None:
            start = time.monotonic()
            subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True)
            seconds = time.monotonic() - start
            expected = file_hashes(out)
            n_finished += 1
            continue
        run = subprocess.Popen(
            [sys.executable, "-c", code, *args],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            error = run.communicate(timeout=draw.uniform(0.2, 1.0) * seconds)[1]
            assert run.returncode == 0, error
            assert file_hashes(out) == expected
            n_finished += 1
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
            n_killed += 1
            if out.exists():
                assert file_hashes(out) == expected
                n_finished += 1
    if n_finished == 1:
        subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True)
        assert file_hashes(out) == expected
    left = {path.name for path in folder.iterdir()}
    assert left <= {*(f"out{n}" for n in range(n_finished + 1)), *(n for n in left if n[0] == ".")}


def test_kill_9_at_a_few_moments(corpus: Path, tmp_path: Path) -> None:
    kill_at_random(corpus, tmp_path, 4, seed=0)


@pytest.mark.slow
def test_kill_9_at_200_moments(corpus: Path, tmp_path: Path) -> None:
    kill_at_random(corpus, tmp_path, 200, seed=1)


def test_a_shard_that_ends_inside_a_document_is_an_error(tmp_path: Path) -> None:
    jobs.write_document_shards([Document("a", "some text")], tmp_path)
    path = tmp_path / "0.part"
    path.write_bytes(path.read_bytes()[:-1])
    message = f"{path} ends in the middle of a document; prepare the data again"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        list(jobs.read_document_shard(path))
