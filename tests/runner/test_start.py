"""A request as a command line for launched processes, and runs that were killed early."""

from __future__ import annotations

import errno
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from pretrain.cli import main
from pretrain.config import RunConfig, compose, parse_overrides, to_yaml
from pretrain.data.preparation import prepare
from pretrain.parallel.config import ParallelConfig
from pretrain.runner import start
from pretrain.runner.request import is_started, is_unresolved, new_run_folder
from pretrain.runner.text import cache_folder, prepared_text
from tiny import TINY


@pytest.mark.parametrize(
    "value",
    ["3e-4", "text", "a: [b]", "é\n", "", None, True, 3, -0.5, 1e-5, math.inf, -math.inf, [1, "2"]],
)
def test_overrides_survive_the_command_line(value: object) -> None:
    overrides: dict[str, dict[str, Any]] = {"train": {"steps": value}, "model": {"d_model": 64}}
    request = start.Request(targets=["my text.txt"], overrides=overrides, accepted=("code",))
    args: list[str] = []
    words = start._command_line(request, Path("runs/a"))
    assert parse_overrides(words, others=args) == overrides
    assert args == ["train", "--run", "runs/a", "my text.txt", "--accept", "code"]


def test_run_without_resolved_settings_starts_from_scratch(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, done = tmp_path / "run", tmp_path / "done"
    assert main(["train", str(corpus), *TINY, "--train.steps", "2", "--run", str(done)]) == 0
    run.mkdir()
    (run / "requested.yaml").write_bytes((done / "config.yaml").read_bytes())
    assert is_started(run)
    assert new_run_folder("name", run) == run  # such a folder may also be used for a new run
    capsys.readouterr()
    assert main(["train", "--resume", "--run", str(run)]) == 0
    assert "was stopped before its settings were resolved" in capsys.readouterr().out
    assert (run / "summary.json").is_file()
    assert not (run / "requested.yaml").exists()
    assert not is_unresolved(run)


@pytest.mark.parametrize("second", ["a prepared folder", "a text"])
def test_prepared_folders_need_weights_and_are_not_mixed_with_texts(
    corpus: Path, tmp_path: Path, second: str
) -> None:
    prepare(corpus, tmp_path / "one", tokenizer="bytes")
    other = Path(shutil.copytree(tmp_path / "one", tmp_path / "two"))
    sources = [str(tmp_path / "one"), str(other if second == "a prepared folder" else corpus)]
    is_named = "each must have its weight" if second == "a prepared folder" else "must not mix"
    with pytest.raises(ValueError, match=is_named):
        prepared_text(compose([{"data": {"source": sources}}]))


@pytest.mark.parametrize("kind", ["new", "resume"])
def test_a_run_that_fails_before_it_is_resolved_can_be_resumed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run, text = tmp_path / "run", Path(shutil.copy(corpus, tmp_path / "text.jsonl"))
    args = ["train", str(text), *TINY, "--train.steps", "2", "--run", str(run)]
    with monkeypatch.context() as patch:  # the tokenizer is written by then
        failure = OSError(errno.EIO, "Input/output error")
        patch.setattr("pretrain.run.directory.write_environment", Mock(side_effect=failure))
        assert main(args) != 0
    assert is_unresolved(run)
    again = ["train", "--resume", "--run", str(run)]
    if kind == "resume":
        shutil.rmtree(run / "tokenizer")
        shutil.rmtree(cache_folder() / "prepared")
        text.rename(tmp_path / "elsewhere.jsonl")  # as on a disk that is not mounted
        assert main(again) == 2
        (tmp_path / "elsewhere.jsonl").rename(text)
    assert main(again) == 0


def test_a_torchrun_that_restarts_with_fewer_processes_launches_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = RunConfig(parallel=ParallelConfig(processes=2))
    (tmp_path / "config.yaml").write_text(to_yaml(stored))
    (tmp_path / "environment.json").write_text("{}")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    requests = []

    def resume(request: start.Request, *_: object) -> start.RunResult:
        requests.append(request)
        assert request.folder is not None
        return start.RunResult(request.folder)

    monkeypatch.setattr(start, "_continued_run", resume)
    request = start.Request(targets=["english"], folder=tmp_path)
    assert start.start(request).folder == tmp_path
    assert [(each.kind, each.overrides) for each in requests] == [
        ("resume", {"parallel": {"processes": 1}})
    ]


def test_several_processes_cannot_measure_the_interval_of_their_first_tasks() -> None:
    run: Any = SimpleNamespace(tasks=["piqa"], world=SimpleNamespace(size=2))
    with pytest.raises(ValueError, match=r"^evaluate\.every must be given") as raised:
        start._with_task_interval(RunConfig(), run)
    assert str(raised.value) == (
        "evaluate.every must be given where several processes resume with their first in-loop "
        "tasks: the interval is measured only at the start of a run; add --evaluate.every N"
    )
