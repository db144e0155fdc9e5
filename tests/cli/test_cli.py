"""The command line: output of each command as text and as JSON, exit codes, names of runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import COMMANDS, main
from pretrain.cli.options import settings_help
from pretrain.runner.request import recipes
from tiny import TINY

Capture = pytest.CaptureFixture[str]


def run_json(capsys: Capture, *words: str) -> dict[str, Any]:
    """Run a command with --json and return its object; standard output has nothing else."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    output = capsys.readouterr()
    assert output.out.count("\n") == 1
    content: dict[str, Any] = json.loads(output.out)
    return content


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pretrain.cli import main; main(['--help']);"
        "print(sorted({'torch', 'numpy', 'rich', 'yaml', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: Capture) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: pretrain {command}" in text
    assert "--json" in text
    if command == "train":
        assert "--optimizer.learning_rate" in text
        assert "peak learning rate" in text


def test_help_of_settings_has_the_full_width_on_every_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = settings_help().splitlines()
    continued = [line for line in lines if line.startswith(" " * 34)]
    assert max(map(len, lines)) <= 100
    assert max(map(len, continued)) > 90, "continued lines are wrapped too early"


def test_help_of_train_takes_little_more_than_python_and_its_parser() -> None:
    """Of the same machine at the same time: a third of a second on one of 2026."""

    def cpu_seconds(code: str) -> float:
        code += (
            "; import resource, sys; used = resource.getrusage(resource.RUSAGE_SELF);"
            "print(used.ru_utime + used.ru_stime, file=sys.stderr)"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stderr)

    help_of_train = "from pretrain.cli import main; main(['train', '--help'])"
    parser = "import argparse, dataclasses, inspect, json, typing"
    ours, python = (
        min(times)
        for times in zip(
            *((cpu_seconds(help_of_train), cpu_seconds(parser)) for _ in range(4)), strict=True
        )
    )
    assert ours < 9 * python, f"{ours:.2f} s of CPU time, {python:.2f} for the parser alone"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "missing.txt"],
        ["train", "--train.steps", "-1"],
        ["train", "--resume", "--run", "missing"],
        ["train", "--accept", "threads"],
        ["extend", "missing", "--train.steps", "9"],
        ["anneal", "missing", "--train.steps", "9"],
        ["evaluate", "missing"],
        ["generate", "missing", "--prompt", "x"],
        ["report", "missing"],
    ],
)
def test_errors_are_reported_before_torch_is_imported(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from pretrain.cli import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("pretrain: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "spins"), [({}, "3000"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_idle_threads_sleep_soon(given: dict[str, str], spins: str | None) -> None:
    """GOMP_SPINCOUNT is set before torch is imported, unless the user has set a wait policy."""
    code = (
        "import os, sys; from pretrain.cli import main; main(['train', '--help']);"
        "assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    bare = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare | given
    )
    assert done.stdout.splitlines()[-1] == str(spins)


def test_runs_get_numbered_names_and_resume_takes_the_newest(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume"]) == 2
    assert "there is no run in runs/" in capsys.readouterr().err
    found = run_json(capsys, "train", str(corpus), *TINY, "--train.steps", "2")
    assert found["run"] == "runs/small-1"
    assert found["steps"] == 2
    assert {"val_bits_per_byte", "checkpoint", "report"} <= set(found)
    assert (
        run_json(capsys, "train", str(corpus), *TINY, "--train.steps", "3")["run"] == "runs/small-2"
    )
    assert run_json(capsys, "train", "--resume")["run"] == "runs/small-2"


def test_a_name_is_a_recipe_then_a_config_file_then_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, corpus: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "english" in recipes()
    (tmp_path / "english").mkdir()  # named like the recipe
    shutil.copy(corpus, tmp_path / "english" / "small.jsonl")
    found = run_json(capsys, "train", "./english", *TINY, "--train.steps", "1", "--run", "text")
    assert found["val_bytes"] < 100_000
    (tmp_path / "mine.yaml").write_text(
        f"data: {{source: '{corpus}'}}\nmodel: {{family: gpt2, n_layers: 1}}\ntrain: {{steps: 1}}\n"
    )
    found = run_json(capsys, "train", "mine.yaml", *TINY)
    assert found["run"] == "runs/mine-1"
    config = (tmp_path / "runs" / "mine-1" / "config.yaml").read_text()
    assert "family: gpt2" in config
    assert "n_layers: 2" in config  # the command line wins


def test_training_continues_without_a_reader_of_its_output(corpus: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pretrain",
        "train",
        str(corpus),
        "--run",
        str(tmp_path / "run"),
    ]
    training = subprocess.Popen([*command, *TINY, "--train.steps", "3"], stdout=subprocess.PIPE)
    assert training.stdout is not None
    assert b"text" in training.stdout.readline()
    training.stdout.close()  # as `head` does
    assert training.wait() == 0
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_terminal_without_a_character_ends_no_run(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", str(finished_run), "--prompt", "été", "--max-tokens", "4"]
    for more, code in ((words, 0), (["generate", "été", "--json"], 2)):
        written = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
        assert main(more) == code
        if code:
            assert "no model at été" in json.loads(written.getvalue())["error"]
        else:
            assert written.getvalue().startswith(rb"\xe9t\xe9")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["train", "englsh"], "did you mean 'english'?"),
        (
            ["train", "--steps", "3"],
            "unrecognized arguments: --steps; did you mean '--train.steps'? See pretrain train "
            "--help",
        ),
        (["trace", "x", "--step", "y"], "argument --step: invalid int value: 'y'; see pretrain tr"),
    ],
    ids=["command", "recipe", "option", "value"],
)
def test_errors_are_json_with_json(capsys: Capture, words: list[str], message: str) -> None:
    assert main([*words, "--json"]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]


def test_evaluate_does_not_overwrite_its_input(
    finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("The people of the United States.\n")
    words = ["evaluate", str(finished_run), "--text", str(file), "--heat-map", str(file)]
    assert main(words) == 2
    assert (
        "mine.txt is also an input or another output, and would be overwritten"
        in capsys.readouterr().err
    )
    assert file.read_text().startswith("The people")


def test_own_text_of_five_kilobytes_needs_only_its_path(
    tmp_path: Path, corpus: Path, capsys: Capture
) -> None:
    text = " ".join(json.loads(line)["text"] for line in corpus.read_text().splitlines()[:3])
    (tmp_path / "own.txt").write_text(text[:5000])
    run = tmp_path / "run"
    found = run_json(
        capsys, "train", str(tmp_path / "own.txt"), "--run", str(run), "--train.steps", "3"
    )
    assert found["steps"] == 3
    assert 0 < found["val_bits_per_byte"] < 9
    assert run_json(capsys, "generate", str(run), "--max-tokens", "5")["completions"]


def test_a_prepared_folder_is_trained_on_as_it_is(
    tmp_path: Path, corpus: Path, capsys: Capture
) -> None:
    out = tmp_path / "prepared"
    made = run_json(capsys, "prepare", str(corpus), "--out", str(out), "--vocab-size", "300")
    assert made["vocab_size"] == 300
    words = [w for w in TINY if w not in ("--tokenizer.vocab_size", "400")]
    run = str(tmp_path / "run")
    assert (
        run_json(capsys, "train", str(out), *words, "--train.steps", "1", "--run", run)["steps"]
        == 1
    )
    assert run_json(capsys, "evaluate", run)["text"]["held-out split"]["tokens"] > 0


def test_evaluate_scores_files(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    text = "The people of the United States.\n"
    (tmp_path / "a.txt").write_text(text)
    name = str(tmp_path / "a.txt")
    row = run_json(capsys, "evaluate", str(finished_run), "--text", name)["text"][name]
    keys = "nats tokens bytes words perplexity word_perplexity bits_per_byte bits_per_byte_stderr"
    assert set(row) == set(keys.split())
    assert row["bytes"] == len(text)
    assert row["words"] == 6


def test_generate_is_reproducible_by_seed(finished_run: Path, capsys: Capture) -> None:
    words = ["generate", str(finished_run), "--prompt", "The", "--max-tokens", "8", "--n", "3"]
    first = run_json(capsys, *words)["completions"]
    assert len(first) == 3
    assert run_json(capsys, *words)["completions"] == first
    assert run_json(capsys, *words, "--seed", "2")["completions"] != first
    greedy = run_json(capsys, *words, "--temperature", "0")["completions"]
    assert greedy[0] == greedy[1] == run_json(capsys, *words, "--top-k", "1")["completions"][0]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("The" + first[0])


def test_a_checkpoint_is_a_model_too(finished_run: Path, capsys: Capture) -> None:
    checkpoint = next((finished_run / "checkpoints").iterdir())
    rows = run_json(capsys, "next", str(checkpoint), "--prompt", "The", "--top", "400")["tokens"]
    assert set(rows[0]) == {"id", "text", "probability"}
    values = [row["probability"] for row in rows]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1.0)


def test_tokenizer_commands_round_trip(
    tmp_path: Path, corpus: Path, capsys: Capture, finished_run: Path
) -> None:
    out = str(tmp_path / "tok")
    made = run_json(capsys, "tokenizer", "train", str(corpus), "--vocab-size", "300", "--out", out)
    assert made["vocab_size"] == 300
    text = "naïve <|endoftext|> text\n"
    (tmp_path / "t.txt").write_text(text)
    ids = run_json(capsys, "tokenizer", "encode", str(tmp_path / "t.txt"), "--tokenizer", out)[
        "ids"
    ]
    (tmp_path / "ids").write_text(" ".join(map(str, ids)))
    found = run_json(capsys, "tokenizer", "decode", str(tmp_path / "ids"), "--tokenizer", out)
    assert found["text"] == text
    found = run_json(capsys, "tokenizer", "inspect", "--tokenizer", str(finished_run))
    assert found["vocab_size"] == 400
    (tmp_path / "empty.txt").write_text("")
    found = run_json(
        capsys, "tokenizer", "inspect", str(tmp_path / "empty.txt"), "--tokenizer", out
    )
    assert found["vocab_size"] == 300
    assert main(["tokenizer", "train", str(corpus), "--out", out]) == 2


def test_report_is_written_for_finished_and_unfinished_runs(
    finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert Path(run_json(capsys, "report", str(finished_run))["report"]).is_file()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished_run, unfinished)
    (unfinished / "summary.json").unlink()
    assert "still running or stopped at step 12" in Path(
        run_json(capsys, "report", str(unfinished))["report"]
    ).read_text(encoding="utf-8")


def test_trackers_read_the_metrics_of_a_run(tmp_path: Path, corpus: Path, capsys: Capture) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    words = [str(corpus), *TINY, "--train.steps", "2", "--report.to", "tensorboard"]
    assert main(["train", *words, "--run", str(run)]) == 0
    for _ in range(600):
        if list(run.glob("tensorboard/*")):
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert list(run.glob("tensorboard/*"))


def test_several_sources_make_one_prepared_folder_and_one_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"the text {name} is short. " * 400, encoding="utf-8")
    sources = [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]
    assert main(["prepare", *sources, "--out", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n_files"], report["n_documents"]) == (2, 2)
    words = ["tokenizer", "train", *sources, "--vocab-size", "270", "--out", str(tmp_path / "t")]
    assert main(words) == 0
    assert main(["prepare", sources[0], sources[0], "--out", str(tmp_path / "twice")]) == 2
    assert "would be read twice" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "s3://bucket/texts"],
        ["train", "--data.source=gs://bucket/texts"],
        ["train", "--run", "s3://bucket/run=1"],
        ["train", "--data.source", "S3://bucket/texts"],
        ["prepare", "a.txt", "s3://bucket/texts", "--out", "here"],
        ["export", "run", "--format", "hf", "--out", "s3://bucket/run"],
    ],
)
def test_a_url_is_rejected_and_no_folder_is_created(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "://bucket" in message
    assert "copy it first" in message
    assert list(tmp_path.iterdir()) == []


def test_prompts_and_document_names_may_be_urls(finished_run: Path, capsys: Capture) -> None:
    words = ["generate", str(finished_run), "--prompt", "https://x", "--max-tokens", "2"]
    assert main(words) == 0
    assert main(["trace", str(finished_run), "--document", "https://x"]) == 2
    assert "is a URL" not in capsys.readouterr().err
