"""What a new user types in the first hour: help, several texts, a config file by hand, the line
that a run ends with, output that nobody reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import missing_package
from pretrain.cli import main
from pretrain.config import read_file
from pretrain.machine import install_command, this_command
from tiny import TINY, write_llama

Capture = pytest.CaptureFixture[str]
PRETRAIN = [sys.executable, "-m", "pretrain"]
SHORT = [*TINY, "--train.steps", "2"]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two texts in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        lines = [f"{name} {i}: the ship came home, and the rain was gold {i}." for i in range(200)]
        (tmp_path / name).write_text("\n".join(lines))
    return ["a.txt", "b.txt"]


def test_help_is_a_command(capsys: Capture) -> None:
    for words, expected in (
        (["help"], ["--help"]),
        (["help", "prepare"], ["prepare", "--help"]),
    ):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert main(expected) == 0
        assert text == capsys.readouterr().out != ""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["evaluate", "--json"]])
def test_a_closed_output_ends_without_a_traceback(words: list[str]) -> None:
    command = subprocess.Popen(
        [*PRETRAIN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()  # before anything is printed
    error = command.stderr.read()
    command.wait()
    command.stderr.close()
    assert "Traceback" not in error
    assert "Broken" not in error


@pytest.mark.skipif(os.name != "posix", reason="shells of POSIX close streams like this")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_an_error_without_streams_has_its_exit_code(closed: str) -> None:
    command = f"{' '.join(PRETRAIN)} evaluate nothing --json {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_full_disk_under_the_output_is_exit_code_75(finished_run: Path) -> None:
    words = ["next", str(finished_run), "--prompt", "The", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PRETRAIN, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 75
    assert done.stderr.endswith("pretrain: No space left on device\n")
    assert "Traceback" not in done.stderr


def test_the_last_line_of_a_run_works_as_printed(texts: list[str]) -> None:
    # Without the environment's folder on the PATH, as after `make train`.
    environment = {**os.environ, "PATH": os.defpath}
    done = subprocess.run(
        [*PRETRAIN, "train", texts[0], *SHORT],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    last = done.stdout.splitlines()[-1]
    assert "  try it  " in last
    command = last.split("try it")[1].strip()
    generated = subprocess.run(
        f"{command} --max-tokens 3 --json", shell=True, env=environment, capture_output=True
    )
    assert len(json.loads(generated.stdout)["completions"]) == 3


def test_messages_name_the_interpreter_in_use_and_no_package_index(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clone = Path(__file__).parents[2]
    monkeypatch.chdir(clone)
    python = clone / ".venv" / "bin" / "python"
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setenv("PYTHONPATH", "")
    assert install_command("zstandard", extra="formats") == (
        ".venv/bin/python -m pip install -e '.[formats]'"
    )
    assert str(missing_package("a zstandard file", "zstandard")) == (
        "a zstandard file needs the package zstandard: .venv/bin/python -m pip install -e "
        "'.[formats]'"
    )
    assert this_command() == ".venv/bin/python -m pretrain"
    monkeypatch.setenv("PYTHONPATH", str(clone / "src"))  # make train PYTHON=...
    assert this_command() == f"PYTHONPATH={clone / 'src'} .venv/bin/python -m pretrain"
    monkeypatch.chdir(tmp_path)
    assert install_command("zstandard", extra="formats") == (
        f"{python} -m pip install -e '{clone}[formats]'"
    )
    monkeypatch.setattr("pretrain.machine.__file__", str(tmp_path / "a/b/pretrain/machine.py"))
    assert install_command("zstandard", extra="formats") == f"{python} -m pip install zstandard"


def test_the_command_is_short_where_the_shell_finds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pretrain").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert this_command() == "pretrain"
    monkeypatch.setattr("sys.executable", "/other/environment/bin/python")
    assert this_command().endswith("/other/environment/bin/python -m pretrain")


def test_several_texts_are_one_corpus(texts: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main(["train", *texts, *SHORT, "--run", "run"]) == 0
    out = capsys.readouterr().out
    assert "2 documents" in out
    assert "mixed" not in out
    config = read_file(tmp_path / "run/config.yaml")
    assert config["data"]["source"] == [str(tmp_path / name) for name in texts]
    assert main(["train", "--resume", "--run", "run"]) == 0
    # The same in a config file, and as one prepared folder.
    Path("mine.yaml").write_text("data:\n  source: [a.txt, b.txt]\n")
    assert main(["train", "mine.yaml", *SHORT, "--run", "from-yaml"]) == 0
    assert main(["prepare", *texts, "--out", "prepared", "--vocab-size", "400"]) == 0
    assert main(["train", "prepared", *SHORT, "--run", "from-folder"]) == 0
    losses = [
        json.loads(Path(run, "summary.json").read_text())["val_tokens"]
        for run in ("run", "from-yaml", "from-folder")
    ]
    assert len(set(losses)) == 1


@pytest.mark.parametrize("other", ["english", "mine.yaml", "missing.txt"])
def test_of_several_targets_all_are_texts(
    texts: list[str], other: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "mine.yaml").write_text("train: {steps: 2}")
    assert main(["train", *texts, other]) == 2
    message = capsys.readouterr().err
    assert other in message
    assert ("must stand alone" in message) == (other != "missing.txt")
    assert not (tmp_path / "runs").exists()


def test_a_config_file_says_what_it_starts_from(
    texts: list[str], tmp_path: Path, capsys: Capture
) -> None:
    mine = "data: {source: a.txt}\ntrain: {steps: 2, minutes: 3}\nmodel: {n_layers: 1}\n"
    Path("mine.yaml").write_text(mine)
    assert main(["train", "mine.yaml", *SHORT, "--model.size", "null", "--run", "mine"]) == 0
    out = capsys.readouterr().out
    assert "note: what this file leaves out has its default (family llama, optimizer adamw)" in out
    assert "note: train.minutes has no effect, because train.steps is 2" in out

    Path("base.yaml").write_text("extends: english\noptimizer: {momentum: 0.8}\n")
    Path("deep").mkdir()
    Path("deep/own.yaml").write_text("extends: ../base.yaml\nmodel: {size: 1, induction: 1}\n")
    data = ["--data.source", "a.txt", *SHORT]
    assert main(["train", "deep/own.yaml", *data, "--run", "own"]) == 0
    assert "note: " not in capsys.readouterr().out
    config = read_file(tmp_path / "own/config.yaml")
    assert (config["model"]["family"], config["model"]["induction"]) == ("fast", 1)
    assert (config["optimizer"]["name"], config["optimizer"]["momentum"]) == ("muon", 0.8)
    # A run's own config has everything.
    assert main(["train", "own/config.yaml", "--run", "again"]) == 0
    assert "leaves out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("a.txt", "--model.size 1 --model.ngram_rows 1024 --optimizer.momentum 0.9"),
        ("", "--data.source a.txt --model.size 1 --model.ngram_rows 1024 --optimizer.momentum 0.9"),
        ("child.yaml", "--data.source a.txt"),
        ("fast.yaml", "--data.source a.txt --model.size 1"),
    ],
)
def test_a_repeated_command_resumes_with_the_settings_of_all_its_files(
    texts: list[str], target: str, settings: str, capsys: Capture
) -> None:
    base = "model: {n_heads: 6, d_model: 48}\noptimizer: {learning_rate: 1e-3}\n"
    Path("base.yaml").write_text(base)
    Path("child.yaml").write_text("extends: base.yaml\nmodel: {n_kv_heads: 3, n_layers: 1}\n")
    Path("fast.yaml").write_text("extends: english\noptimizer: {momentum: 0.8}\n")
    words = "--model.context_length 32 --train.batch_tokens 256 --train.steps 2 --train.threads 1"
    args = ["train", *target.split(), *settings.split(), *words.split(), "--run", "run"]
    args += ["--train.device", "cpu", "--tokenizer.vocab_size", "400"]
    assert main(args) == 0
    capsys.readouterr()
    assert main([*args, "--resume"]) == 0
    assert "run is finished" in capsys.readouterr().out
    if target == "child.yaml":
        Path("base.yaml").write_text(base.replace("1e-3", "2e-3"))
        assert main([*args, "--resume"]) == 2
        message = "optimizer.learning_rate: 0.001 -> 0.002   (--accept optimizer.learning_rate)"
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("mine.yaml", "mine.yaml extends itself"),
        ("other.yaml", "there is no config file other.yaml"),
        (
            "[a]",
            "mine.yaml: extends is ['a']; it must be a recipe (characters, english, multitask, "
            "transformer) or a .yaml file",
        ),
    ],
)
def test_what_a_config_extends_must_be_there(
    texts: list[str], base: str, message: str, capsys: Capture
) -> None:
    Path("mine.yaml").write_text(f"extends: {base}\n")
    assert main(["train", "mine.yaml"]) == 2
    assert capsys.readouterr().err == f"pretrain: {message}\n"


def test_multitask_trains_on_demonstrations_without_translations(
    texts: list[str], tmp_path: Path, capsys: Capture
) -> None:
    with open("articles.jsonl", "w", encoding="utf-8") as file:
        for i in range(40):
            sentences = [f"It is the ship of number {i} and {i * j}." for j in range(30)]
            record = {"title": f"Ship {i}", "text": f"Ship {i} is a ship. {' '.join(sentences)}"}
            file.write(json.dumps(record) + "\n")
    assert main(["demonstrate", "articles.jsonl"]) == 0
    assert capsys.readouterr().out.endswith(" train multitask\n")
    assert not Path("demonstrations/train/translate.jsonl").exists()
    small = ["--model.size", "1", "--model.ngram_rows", "0", *SHORT, "--run", "run"]
    assert main(["train", "multitask", *small]) == 0
    source = read_file(tmp_path / "run/config.yaml")["data"]["source"]
    assert str(tmp_path / "demonstrations/train/articles.jsonl") in [
        each["path"] for each in source
    ]


def test_a_plan_says_what_a_run_costs(texts: list[str], capsys: Capture) -> None:
    assert main(["train", "a.txt", *SHORT, "--model.ngram_rows", "65536"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"  disk +up to [\d,]+ MB a checkpoint; .*\n  memory +about [\d,]+ MB\n", out)
    assert " parameters are many for " in out
    assert "--model.ngram_rows 0 saves disk and time." in out
    first = next(line for line in out.splitlines() if line.startswith("step      1/2 | loss"))
    assert first.endswith(" left")
    assert re.search(r"  cost +[\d.]+ s \(training [\d.]+ s, evaluation [\d.]+ s, ", out)


def test_a_note_advises_nothing_that_is_done_already(texts: list[str], capsys: Capture) -> None:
    wide = ["--model.ngram_rows", "0", "--model.n_heads", "4", "--model.d_model", "256"]
    assert main(["train", "a.txt", *SHORT, *wide]) == 0
    assert "; a smaller --model.d_model saves disk and time." in capsys.readouterr().out


def test_the_whole_config_file_of_the_docs_is_a_run(texts: list[str], tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/config-file.md").read_text(encoding="utf-8")
    Path("mine.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    Path("my.txt").write_text(Path("a.txt").read_text() * 3)
    words = ["--train.steps", "2", "--tokenizer.vocab_size", "300", "--run", "run"]
    assert main(["train", "mine.yaml", *words]) == 0
    config = read_file(tmp_path / "run/config.yaml")
    assert (config["model"]["family"], config["schedule"]["name"]) == ("llama", "wsd")


def test_an_imported_model_has_nothing_to_report(tmp_path: Path, capsys: Capture) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    write_llama(model, context_length=16)
    assert main(["import", str(model), "--out", str(run)]) == 0
    for command in (["report", str(run)], ["trace", str(run), "--step", "1"], ["verify", str(run)]):
        capsys.readouterr()
        assert main(command) == 2
        assert f"{run} was imported, not trained" in capsys.readouterr().err
    assert not (run / "report.html").exists()
