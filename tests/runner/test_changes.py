"""A run that goes on otherwise: every difference is shown and accepted by name, a finished run is
extended or annealed under a printed schedule, and no death between two files loses anything."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.checkpoint import list_checkpoints
from pretrain.cli import main
from pretrain.cli import resuming as resuming_module
from pretrain.run.identity import differences, read_records
from runs import assert_same_run, records, stop_after
from tiny import TINY

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
SHORT = [
    *TINY,
    *"--model.family gpt2 --optimizer.name adamw --optimizer.learning_rate 3e-3".split(),
    *"--train.steps 8 --train.evaluate_every 4 --schedule.warmup_steps 2".split(),
]


@pytest.fixture(scope="module")
def ended(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 8 steps, wsd."""
    run = tmp_path_factory.mktemp("ended") / "run"
    assert main(["train", str(corpus), *SHORT, "--run", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def level(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 8 steps whose rate never falls."""
    run = tmp_path_factory.mktemp("level") / "run"
    words = [*SHORT, "--schedule.name", "constant", "--model.dropout", "0.1"]
    assert main(["train", str(corpus), *words, "--run", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after 3 of its 8 steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert main(["train", str(corpus), *SHORT, "--run", str(run)]) == 143
    return run


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a run under a name of its own."""

    def made(run: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(run, tmp_path / name))

    return made


def resume(run: Path, *words: str) -> int:
    return main(["train", "--resume", "--run", str(run), *words])


def refused(capsys: Capture, *words: str) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def config_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return content


def rates(run: Path) -> list[float]:
    return [r["learning_rate"] for r in records(run) if r["kind"] == "train"]


class Killed(BaseException):
    """The end of the process, as nobody can catch it."""


def dying(*_: Any, **__: Any) -> Any:
    raise Killed


# --- accepting


def test_a_difference_names_the_word_that_accepts_it(
    stopped: Path, copy: Callable[..., Path], capsys: Capture, monkeypatch: Patch
) -> None:
    run = copy(stopped)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    monkeypatch.setattr("pretrain.run.identity.code_hash", lambda: "another")
    wanted = ["--optimizer.clip", "2", "--train.threads", "2"]
    said = refused(capsys, "train", "--resume", "--run", str(run), *wanted)
    for line in (
        "optimizer.clip: 1.0 -> 2.0   (--accept optimizer.clip)",
        "threads: 1 -> 2   (--accept threads)",
        "-> another   (--accept code)",
    ):
        assert line in said
    said = refused(capsys, "train", "--resume", "--run", str(run), *wanted, "--accept", "threads")
    assert "threads: 1 -> 2   (accepted)" in said
    said = refused(capsys, "train", "--resume", "--run", str(run), "--accept", "torch")
    assert "--accept torch: that has not changed; changed: code" in said
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_what_would_be_another_run_cannot_be_accepted(stopped: Path, capsys: Capture) -> None:
    said = refused(
        capsys,
        *("train", "--resume", "--run", str(stopped)),
        *"--train.steps 9 --train.seed 2 --train.batch_tokens 512 --model.d_model 64".split(),
        *"--optimizer.name muon --accept train.seed --accept train.steps".split(),
    )
    for name in ("train.steps", "train.seed", "train.batch_tokens", "model.d_model"):
        line = next(line for line in said.splitlines() if line.startswith(f"  {name}: "))
        assert "(cannot be accepted: " in line
    assert "pretrain extend RUN --train.steps N, or pretrain anneal" in said
    assert "--accept goes with --resume" in refused(capsys, "train", "--accept", "threads")


def test_other_text_is_one_word_and_is_refused_before_it_is_prepared(
    stopped: Path, copy: Callable[..., Path], corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, other = copy(stopped), tmp_path / "other.jsonl"
    other.write_bytes(corpus.read_bytes().replace(b"the", b"then"))
    words = ["train", "--resume", "--run", str(run), "--data.source", str(other)]
    assert "(--accept data.source)" in refused(capsys, *words)
    prepared = Path(os.environ["PRETRAIN_CACHE"]) / "prepared"
    before = set(prepared.iterdir())
    assert "(--accept data.source)" in refused(capsys, *words)
    assert set(prepared.iterdir()) == before
    # A tokenizer of its own, of the same size: another meaning of each id, which takes a word.
    words += ["--accept", "data.source"]
    said = refused(capsys, *words)
    assert "held-out text: " in said
    assert "(--accept tokenizer)" in said
    assert main([*words, "--accept", "tokenizer"]) == 0
    named = [each["what"] for each in read_records(run)]
    assert named == ["data.source", "held-out-text", "tokenizer", "training-text"]
    assert config_of(run)["data"]["source"] == str(other)
    changed = (run / "tokenizer" / "tokenizer.json").read_bytes()
    assert changed != (stopped / "tokenizer" / "tokenizer.json").read_bytes()


def test_a_tokenizer_of_another_size_cannot_be_accepted(
    stopped: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    made, prepared = str(tmp_path / "made"), str(tmp_path / "prepared")
    assert main(["tokenizer", "train", str(corpus), "--vocab-size", "300", "--out", made]) == 0
    assert main(["prepare", str(corpus), "--tokenizer", made, "--out", prepared]) == 0
    words = ["train", "--resume", "--run", str(stopped), "--data.source", prepared]
    words += ["--accept", "data.source", "--accept", "tokenizer"]
    said = refused(capsys, *words, "--tokenizer.vocab_size", "300")
    assert "vocab_size: 400 -> 300   (cannot be accepted: the model has a row" in said
    said = refused(capsys, *words)
    assert "(cannot be accepted: the model has a row for each of 400 tokens" in said


def test_what_is_accepted_is_recorded_and_the_next_resume_is_quiet(
    stopped: Path, copy: Callable[..., Path], capsys: Capture, monkeypatch: Patch
) -> None:
    run = copy(stopped)
    monkeypatch.setattr("pretrain.run.identity.code_hash", lambda: "another")
    words = ["--optimizer.clip", "2", "--accept", "optimizer.clip", "--accept", "code"]
    with monkeypatch.context() as patch:
        # Dead before the first step, and so before a checkpoint that knows.
        patch.setattr("pretrain.train.loop.compute_gradients", dying)
        with pytest.raises(Killed):
            resume(run, *words)
    said = capsys.readouterr().out
    assert "accepted from step 3 on: optimizer.clip: 1.0 -> 2.0" in said
    assert config_of(run)["optimizer"]["clip"] == 2.0
    recorded = read_records(run)
    assert [(r["step"], r["what"], r["new"]) for r in recorded] == [
        (3, "code", "another"),
        (3, "optimizer.clip", 2.0),
    ]
    assert {"old", "time", "by"} <= set(recorded[0])
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert resume(run, *words) == 143
    assert resume(run) == 0
    assert read_records(run) == recorded


@pytest.mark.parametrize("dies_in", ["write_records", "replace_file"])
def test_a_death_while_a_change_is_written_down_loses_nothing(
    stopped: Path, copy: Callable[..., Path], monkeypatch: Patch, dies_in: str
) -> None:
    words = ["--schedule.final_fraction", "0.5", "--accept", "schedule.final_fraction"]
    whole, parts = copy(stopped, "whole"), copy(stopped, "parts")
    assert resume(whole, *words) == 0
    with monkeypatch.context() as patch:
        patch.setattr(resuming_module, dies_in, dying)
        with pytest.raises(Killed):
            resume(parts, *words)
    assert resume(parts, *words) == 0
    assert_same_run(whole, parts)
    assert config_of(whole) == config_of(parts)
    assert len(read_records(whole)) == len(read_records(parts)) == 2


def test_another_rate_holds_from_its_step_on_and_is_drawn(
    stopped: Path, ended: Path, copy: Callable[..., Path], capsys: Capture, monkeypatch: Patch
) -> None:
    run = copy(stopped)
    words = ["--optimizer.learning_rate", "1e-3", "--accept", "optimizer.learning_rate"]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert resume(run, *words) == 143
    said = capsys.readouterr().out
    assert "old rate" in said
    assert said.index("old rate") < said.index("resuming")
    (past,) = config_of(run)["schedule"]["history"]
    assert (past["until_step"], past["learning_rate"], past["steps"]) == (3, 3e-3, 8)
    # Both newer checkpoints are lost, the steps that are made again have the rates that they had.
    for checkpoint in list_checkpoints(run / "checkpoints"):
        if checkpoint.name != "step-00000003":
            shutil.rmtree(checkpoint)
    shutil.copytree(stopped / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    assert resume(run) == 0
    old = rates(ended)
    assert rates(run)[:3] == old[:3]
    assert rates(run)[3:] == pytest.approx([rate / 3 for rate in old[3:]])


def test_a_config_that_was_edited_is_another_config(
    stopped: Path, copy: Callable[..., Path], capsys: Capture
) -> None:
    run = copy(stopped)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("steps: 8\n", "steps: 16\n"))
    said = refused(capsys, "train", "--resume", "--run", str(run))
    assert "train.steps: 8 -> 16   (cannot be accepted: the schedule depends on it" in said


def test_a_setting_that_one_version_alone_has_is_no_change() -> None:
    found = differences({"a.b": 1, "code": "x"}, {"a.c": 2, "code": "y", "first weights": "z"})
    assert [change.name for change in found] == ["code", "first weights"]
    assert found[1].word == "first-weights"


# --- extending and annealing


@pytest.mark.parametrize("stop_at", [1, 6])
def test_a_killed_and_resumed_extension_is_the_uninterrupted_one(
    level: Path, copy: Callable[..., Path], monkeypatch: Patch, stop_at: int
) -> None:
    whole, parts = copy(level, "whole"), copy(level, "parts")
    words = ["--train.steps", "16", "--schedule.name", "cosine"]
    assert main(["extend", str(whole), *words]) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        assert main(["extend", str(parts), *words]) == 143
    assert resume(parts) == 0
    assert_same_run(whole, parts)
    assert config_of(whole) == config_of(parts)
    assert json.loads((whole / "summary.json").read_text())["steps"] == 16
    assert json.loads((whole / "summary.json.1").read_text())["steps"] == 8
    assert (whole / "baselines.json.1").is_file()
    assert rates(whole)[:8] == rates(level)


def test_an_extension_whose_newest_states_are_lost_makes_old_steps_at_their_old_rates(
    level: Path, copy: Callable[..., Path], monkeypatch: Patch, capsys: Capture
) -> None:
    run = copy(level)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert main(["extend", str(run), "--train.steps", "12", "--schedule.name", "wsd"]) == 143
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(level / "checkpoints", run / "checkpoints")
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    capsys.readouterr()
    assert resume(run) == 0
    said = capsys.readouterr().out
    assert "after step 4" in said
    assert "note: " not in said
    assert rates(run)[:8] == rates(level)
    assert len(rates(run)) == 12


def test_the_config_of_an_extended_run_is_that_run(
    ended: Path, copy: Callable[..., Path], tmp_path: Path
) -> None:
    run, again = copy(ended), tmp_path / "again"
    assert main(["extend", str(run), "--train.steps", "14"]) == 0
    assert main(["train", str(run / "config.yaml"), "--run", str(again)]) == 0
    losses, others = (
        [r["loss"] for r in records(each) if r["kind"] == "train"] for each in (run, again)
    )
    assert losses == others
    assert rates(run) == rates(again)


def test_an_extension_is_drawn_and_recorded_before_its_first_step(
    ended: Path, copy: Callable[..., Path], capsys: Capture
) -> None:
    run = copy(ended)
    capsys.readouterr()
    assert main(["extend", str(run), "--train.steps", "16", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["steps"] == 16
    assert (
        said.err.index("old rate") < said.err.index("resuming") < said.err.index("step     16/16")
    )
    drawn = next(line for line in said.err.splitlines() if line.startswith("        15 "))
    assert drawn.split()[1] == "-"
    verb = next(each for each in read_records(run) if each["what"] == "extend")
    assert (verb["step"], verb["old"], verb["new"], verb["by"]) == (8, 8, 16, "extend")
    assert [row["step"] for row in verb["curve"]][-1] == 15
    assert all(row["new"] == rates(run)[row["step"]] for row in verb["curve"])
    train, schedule = config_of(run)["train"], config_of(run)["schedule"]
    assert (train["evaluate_every"], train["save_every"]) == (4, 4)
    assert (schedule["origin_step"], schedule["warmup_steps"]) == (8, 2)
    # Once more, from there.
    assert main(["extend", str(run), "--train.steps", "20"]) == 0
    assert (run / "summary.json.2").is_file()
    assert [past["until_step"] for past in config_of(run)["schedule"]["history"]] == [8, 16]


def test_an_annealing_falls_in_a_straight_line_to_zero(
    level: Path, copy: Callable[..., Path], capsys: Capture
) -> None:
    run = copy(level)
    assert main(["anneal", str(run), "--train.steps", "12"]) == 0
    assert rates(run)[:8] == rates(level)
    assert rates(run)[8:] == pytest.approx([3e-3, 3e-3 * 0.75, 3e-3 * 0.5, 3e-3 * 0.25])
    said = refused(capsys, "anneal", str(run), "--train.steps", "20")
    assert "has fallen to 0 already (annealing, final_fraction 0)" in said
    # An extension knows the run's own shape.
    assert main(["extend", str(run), "--train.steps", "16"]) == 0
    assert rates(run)[-1] == 3e-3


# Each function is called last before the death.
@pytest.mark.parametrize("dies_in", ["write_records", "replace_file", "set_aside", "rename"])
@pytest.mark.parametrize("goes_on_by", ["extend", "resume"])
def test_a_death_while_an_extension_is_written_down_loses_nothing(
    ended: Path, copy: Callable[..., Path], monkeypatch: Patch, dies_in: str, goes_on_by: str
) -> None:
    run, words = copy(ended), ["--train.steps", "12"]
    renames = iter([Path.rename, dying])
    with monkeypatch.context() as patch:
        if dies_in == "rename":
            # The baselines are aside, the summary is not.
            patch.setattr(Path, "rename", lambda path, to: next(renames)(path, to))
        elif dies_in == "set_aside":
            patch.setattr("pretrain.cli.going_on.set_aside", dying)
        else:
            patch.setattr(resuming_module, dies_in, dying)
        with pytest.raises(Killed):
            main(["extend", str(run), *words])
    was_written = dies_in in ("set_aside", "rename")
    if goes_on_by == "resume":
        assert resume(run) == 0
        if not was_written:
            assert rates(run) == rates(ended)  # it was not extended, and says that it is finished
    assert main(["extend", str(run), *words]) == (
        2 if goes_on_by == "resume" and was_written else 0
    )
    assert json.loads((run / "summary.json").read_text())["steps"] == 12
    assert {p.name for p in run.glob("*.json.*")} == {"summary.json.1", "baselines.json.1"}
    assert [each["what"] for each in read_records(run)].count("extend") == 1
    assert resume(run) == 0


def test_an_extension_by_other_code_has_to_be_accepted(
    ended: Path, copy: Callable[..., Path], capsys: Capture, monkeypatch: Patch
) -> None:
    run = copy(ended)
    monkeypatch.setattr("pretrain.run.identity.code_hash", lambda: "another")
    words = ["extend", str(run), "--train.steps", "12"]
    assert "-> another   (--accept code)" in refused(capsys, *words)
    assert config_of(run) == config_of(ended)
    assert main([*words, "--accept", "code"]) == 0
    # Other settings than those of the schedule are changes like any other.
    more = [*words[:-1], "16", "--optimizer.clip", "2"]
    assert "(--accept optimizer.clip)" in refused(capsys, *more)
    assert main([*more, "--accept", "optimizer.clip"]) == 0
    assert config_of(run)["optimizer"]["clip"] == 2.0


def test_what_cannot_be_continued_is_refused_in_a_sentence(
    ended: Path, stopped: Path, level: Path, copy: Callable[..., Path], capsys: Capture
) -> None:
    said = refused(capsys, "extend", str(stopped), "--train.steps", "16")
    assert "is not finished; let it end: pretrain train --resume --run" in said
    said = refused(capsys, "extend", str(ended), "--train.steps", "8")
    assert "train.steps 8 is not more than the 8 steps" in said
    assert "extend needs --train.steps N" in refused(capsys, "extend", str(ended))
    said = refused(capsys, "anneal", str(ended), "--train.steps", "16")
    assert "has fallen to 0 already (wsd, final_fraction 0)" in said
    assert "pretrain extend" in said
    said = refused(capsys, "extend", str(ended), "--train.steps", "10")
    assert "take train.steps 11 or more" in said
    said = refused(
        capsys, "anneal", str(level), "--train.steps", "9", "--schedule.final_fraction", "1"
    )
    assert "schedule.final_fraction 1 is not below the 1 of the peak rate" in said
    checkpoint = list_checkpoints(ended / "checkpoints")[-1]
    said = refused(capsys, "anneal", str(checkpoint), "--train.steps", "16")
    assert "--train.init_from" in said
    run = copy(ended)
    (run / "environment.json").unlink()
    assert "was imported" in refused(capsys, "extend", str(run), "--train.steps", "16")


def test_a_damaged_last_state_is_not_replaced_by_an_older_one(
    ended: Path, copy: Callable[..., Path], capsys: Capture
) -> None:
    run = copy(ended)
    file = run / "checkpoints" / "step-00000008" / "model-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 16
    file.write_bytes(data)
    said = refused(capsys, "extend", str(run), "--train.steps", "16")
    assert "the state after its last step is damaged" in said
    assert file.exists()
    assert config_of(run) == config_of(ended)


def test_a_run_that_patience_stopped_needs_more_of_it(
    corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    stops = "--train.patience 1 --train.evaluate_every 1 --optimizer.learning_rate 0.5".split()
    assert main(["train", str(corpus), *SHORT, *stops, "--run", str(run)]) == 0
    done = json.loads((run / "summary.json").read_text())["steps"]
    assert done < 8
    words = ["extend", str(run), "--train.steps", str(done + 4)]
    assert "give --train.patience 2, or --train.patience null" in refused(capsys, *words)
    assert main([*words, "--train.patience", "null", "--optimizer.learning_rate", "1e-3"]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == done + 4


def test_a_mixture_goes_on_only_where_its_seen_samples_stay(
    corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(corpus.read_bytes().replace(b"the", b"then"))
    for stage, code in (("", 0), (", stage: 0.5", 2)):
        run = tmp_path / f"run{code}"
        source = f"[{{path: {corpus}, weight: 1}}, {{path: {other}, weight: 1{stage}}}]"
        assert main(["train", "--data.source", source, *SHORT, "--run", str(run)]) == 0
        capsys.readouterr()
        assert main(["extend", str(run), "--train.steps", "12"]) == code
    assert "at the samples 0, 32 of 8 steps and 0, 48 of 12" in capsys.readouterr().err
