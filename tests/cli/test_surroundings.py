"""What a command finds around it: volumes, users without a home, variables of other jobs."""

from __future__ import annotations

import errno
import io
import json
import os
import pwd
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.cli import main
from tiny import TINY

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
STEPS = ["--train.steps", "2"]
EXPORT = ["--format", "hf", "--unverified"]


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: Patch) -> Path:
    """An empty folder that can be neither removed nor renamed, with a parent for root only."""
    out = tmp_path / "volume"
    out.mkdir()

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            inside = isinstance(path, int) or out in Path(os.path.abspath(path)).parents
            if not inside and tmp_path in Path(os.path.abspath(path)).parents:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
            return real(path, *args, **options)

        return call

    for name in ("mkdir", "rmdir", "rename"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    return out


def test_a_volume_is_a_prepared_folder(corpus: Path, volume: Path, capsys: Capture) -> None:
    """QwenPaw issue 3827 (2026), ludwig issue 2225 (2022): all of the work was done, and lost."""
    args = ["prepare", str(corpus), "--tokenizer", "bytes", "--out", str(volume)]
    assert main(args) == 0
    names = {path.name for path in volume.iterdir()}
    assert {"manifest.json", "train.bin", "report.json"} < names
    assert not any(name.startswith(".") for name in names)
    assert [path.name for path in volume.parent.iterdir()] == ["volume"]
    assert main(args) == 2  # like any other folder that is not empty
    assert "exists and has" in capsys.readouterr().err


def test_a_preparation_that_was_stopped_continues_in_its_volume(
    corpus: Path, volume: Path, monkeypatch: Patch
) -> None:
    from pretrain.data import preparation

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    args = ["prepare", str(corpus), "--tokenizer", "bytes", "--out", str(volume)]
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_write_folder", stop)
        assert main(args) == 130
    assert (volume / ".pretrain-work").is_dir()
    assert main(args) == 0
    assert not (volume / ".pretrain-work").exists()


@pytest.mark.parametrize("command", ["export", "import", "demonstrate", "tokenizer", "train"])
def test_a_volume_is_the_folder_of_every_command(
    finished_run: Path,
    corpus: Path,
    volume: Path,
    tmp_path_factory: pytest.TempPathFactory,
    command: str,
) -> None:
    exported = tmp_path_factory.mktemp("exported") / "out"
    if command == "import":
        assert main(["export", str(finished_run), *EXPORT, "--out", str(exported)]) == 0
    args = {
        "export": ["export", str(finished_run), *EXPORT, "--out", str(volume)],
        "demonstrate": ["demonstrate", str(corpus), "--out", str(volume)],
        "tokenizer": ["tokenizer", "train", str(corpus), "--out", str(volume)],
        "train": ["train", str(corpus), *TINY, *STEPS, "--run", str(volume)],
        "import": ["import", str(exported), "--out", str(volume)],
    }
    assert main(args[command]) == 0
    assert any(volume.iterdir())
    assert not any(path.name.startswith(".") for path in volume.iterdir())
    assert [path.name for path in volume.parent.iterdir()] == ["volume"]


def test_a_user_without_a_home_reads_how_to_name_a_cache(
    corpus: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """docker --user 12345: h2o-llmstudio issue 974 (2026)."""

    def no_such_user(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "PRETRAIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    args = ["train", str(corpus), *TINY, *STEPS, "--run", str(tmp_path / "run")]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert "this user has no home folder; set the environment variable PRETRAIN_CACHE" in error
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    assert main(args) == 0


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME", "PRETRAIN_CACHE"])
def test_a_cache_that_cannot_be_written_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture, variable: str
) -> None:
    """HOME=/ in a container: "Permission denied: /.cache" did not say what to do."""
    for name in ("HOME", "PRETRAIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(variable, str(file))
    args = ["train", str(corpus), *TINY, *STEPS, "--run", str(tmp_path / "run")]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert f": {file}" in error
    assert "Not a directory; set the environment variable PRETRAIN_CACHE" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_text_that_is_in_a_cache_of_others_is_read(
    corpus: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    args = ["train", str(corpus), *TINY, *STEPS, "--run"]
    assert main([*args, str(tmp_path / "one")]) == 0
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "cache" not in str(path) and access(path, mode)
    )
    assert main([*args, str(tmp_path / "other")]) == 0
    assert main([*args, str(tmp_path / "third"), "--tokenizer.vocab_size", "301"]) == 2
    error = capsys.readouterr().err
    assert "Permission denied; set the environment variable PRETRAIN_CACHE to a folder" in error
    assert f": {tmp_path / 'cache' / 'prepared'}" in error


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_a_run_continues_when_nobody_reads_what_it_prints(
    corpus: Path, tmp_path: Path, monkeypatch: Patch, number: int
) -> None:
    """`train | head` (EPIPE), and a terminal that was closed (EIO), from the first line on."""

    class Gone(io.TextIOWrapper):
        has_text = False

        def write(self, text: str) -> int:
            self.has_text = True
            return super().write(text)

        def flush(self) -> None:
            if self.has_text and os.readlink(f"/proc/self/fd/{self.fileno()}") != os.devnull:
                raise OSError(number, os.strerror(number))
            super().flush()

    run = tmp_path / "run"
    with open(tmp_path / "terminal", "wb") as file:
        monkeypatch.setattr(sys, "stdout", Gone(file, encoding="utf-8"))
        assert main(["train", str(corpus), *TINY, *STEPS, "--run", str(run)]) == 0
    assert (run / "summary.json").is_file()


@pytest.mark.parametrize("command", ["generate", "next", "evaluate", "prepare"])
def test_a_command_of_one_process_waits_for_no_others(
    finished_run: Path, corpus: Path, tmp_path: Path, monkeypatch: Patch, command: str
) -> None:
    """A shell in the pod of a PyTorchJob has these variables: ignite issue 2048 (2021)."""
    run = str(finished_run)
    args = {
        "generate": ["generate", run, "--n", "1", "--max-tokens", "2"],
        "next": ["next", run],
        "evaluate": ["evaluate", run, "--text", str(corpus)],
        "prepare": ["prepare", str(corpus), "--tokenizer", "bytes", "--out", str(tmp_path / "p")],
    }
    launcher = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "9"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert main(args[command]) == 0


def test_training_with_half_of_the_variables_of_a_launcher_is_rejected(
    corpus: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(corpus), *TINY, *STEPS, "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "environment variables, RANK below WORLD_SIZE (got WORLD_SIZE '2', RANK None" in error
    assert "to run one process: unset WORLD_SIZE" in error
    assert not (tmp_path / "run").exists()


def test_a_memory_that_is_full_is_one_sentence(
    corpus: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Errors of Python, and of torch 2.13 on a CPU and on a GPU."""
    on_cpu = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 536870912 bytes"
    errors = [MemoryError(), RuntimeError(on_cpu), torch.OutOfMemoryError("CUDA out of memory")]
    for error in errors:

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("pretrain.cli.commands.prepare.prepare", fail)
        assert main(["prepare", str(corpus), "--out", "out"]) == 75
        message = capsys.readouterr().err
        assert message.startswith("pretrain: out of memory: ")
        assert message.endswith("; a smaller model, micro-batch or text needs less\n")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EACCES, 2),
        (errno.EROFS, 2),
        (errno.ENAMETOOLONG, 2),
        (errno.EMFILE, 2),
        (errno.ELOOP, 2),
        (errno.EBUSY, 2),
        (errno.EIO, 2),
        (errno.ENOSPC, 75),
        (errno.EDQUOT, 75),
    ],
)
def test_what_the_system_does_not_allow_is_one_sentence(
    corpus: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture, number: int, code: int
) -> None:
    def fail(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("pretrain.cli.commands.prepare.prepare", fail)
    assert main(["prepare", str(corpus), "--out", str(tmp_path / "out"), "--json"]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert os.strerror(number) in json.loads(captured.out)["error"]
