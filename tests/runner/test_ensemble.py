"""A run of several networks: trained one after the other, averaged with the counts of the text."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.config import compose
from pretrain.run.directory import read_summary, write_json
from pretrain.runner import start
from pretrain.runner.checks import read_run_config
from pretrain.runner.ensemble import average, member_settings, train_members
from pretrain.runner.open import load_model
from pretrain.runner.text import text_of_run
from pretrain.train.resolve import fit_members, fit_table_rows
from runs import stop_after
from tiny import TINY

PROMPT = "The people of the United States"
PARTS = "--train.members 2 --train.counts 1 --train.steps 24 --train.evaluate_every 12".split()


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two networks and counts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", str(corpus), *TINY, *PARTS, "--run", str(run)]) == 0
    return run


def probabilities(path: Path, *, alone: bool = False) -> list[float]:
    model = load_model(path, device="cpu", alone=alone)
    found = {each.id: each.probability for each in model.next_tokens(PROMPT, top=10**6)}
    return [found[id_] for id_ in sorted(found)]


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in summary.items()
        if "second" not in key and key != "peak_memory_bytes"
    }


def test_a_mean_of_chosen_checkpoints_gets_their_share_of_what_is_missing(
    whole: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    before = read_summary(run)
    # As if the first network had been chosen with a bias; the second's checkpoint is gone.
    lone = {"choice": {"nats": 1000.0, "bits_per_byte": 1.0, "note": ""}}
    write_json(run / "summary.json", before | lone)
    after = average(run, read_run_config(run))
    weight = after["mix"][0]["weight"]
    assert 0 < weight < 1
    assert after["choice"]["nats"] == pytest.approx(weight * 1000)
    n = after["val_tokens"]
    bits = after["choice"]["bits_per_byte"] * after["val_bytes"] * math.log(2)
    assert n * after["val_nats_per_token"] == pytest.approx(bits + weight * 1000)


def test_the_mean_is_better_than_each_part_and_is_what_evaluate_scores(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = read_summary(whole)
    parts = summary["mix"]
    assert [part["name"] for part in parts] == ["network 1", "network 2", "counts"]
    assert sum(part["weight"] for part in parts) == pytest.approx(1)
    assert summary["val_bits_per_byte"] < min(part["bits_per_byte"] for part in parts) + 1e-3
    capsys.readouterr()
    assert main(["evaluate", str(whole), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["text"].values()
    # The weights of each half are fitted to the other, those of the model to both.
    assert row["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=5e-3)
    assert row["bits_per_byte"] <= summary["val_bits_per_byte"]
    assert row["tokens"] == summary["val_tokens"]


def test_its_probabilities_are_the_weighted_mean(whole: Path) -> None:
    lines = json.loads((whole / "mix" / "mix.json").read_text())["parts"]
    first, mean = probabilities(whole, alone=True), probabilities(whole)
    assert len(lines) == 3
    assert sum(mean) == pytest.approx(1, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(first, mean, strict=True)) > 1e-3
    assert all(m >= lines[0]["weight"] * p - 1e-6 for m, p in zip(mean, first, strict=True))


def test_the_networks_begin_from_other_weights_and_read_the_same_text(whole: Path) -> None:
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, whole / "members" / "2")
    ]
    first, second = ([each for each in log if each["kind"] == "train"] for log in logs)
    assert len(first) == len(second) == 24
    assert first[-1]["loss"] != second[-1]["loss"]
    texts = [text_of_run(load_model(whole, alone=alone), print) for alone in (True, False)]
    assert texts[0].split("val").sha256 == texts[1].split("val").sha256


def test_what_the_mean_contains_is_not_kept_twice(whole: Path) -> None:
    assert not (whole / "members" / "2" / "checkpoints").exists()
    assert (whole / read_summary(whole)["checkpoint"]).is_dir()


@pytest.mark.parametrize("network", [1, 2])
def test_a_run_that_was_stopped_in_any_network_ends_as_one_that_was_not(
    corpus: Path,
    whole: Path,
    tmp_path: Path,
    network: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if network == 1:
            stop_after(patch, 4)
        else:
            train_member = start._train_member

            def stopped(*args: Any) -> int:
                stop_after(patch, 4)
                return train_member(*args)

            patch.setattr(start, "_train_member", stopped)
        assert main(["train", str(corpus), *TINY, *PARTS, "--run", str(run)]) == 143
    assert f"train --resume --run {run}\n" in capsys.readouterr().out
    assert main(["train", "--resume", "--run", str(run)]) == 0
    resumed, expected = (without_times(read_summary(each)) for each in (run, whole))
    assert resumed == expected
    summary = read_summary(run)
    assert summary["total_seconds"] > sum(summary["seconds"].values())
    assert probabilities(run) == probabilities(whole)


def test_a_run_that_was_killed_before_its_mean_gets_it_by_a_resume(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    summary = read_summary(run)
    (run / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k != "mix"}))
    assert main(["train", "--resume", "--run", str(run)]) == 0
    out = capsys.readouterr().out
    assert "nothing left to train" not in out
    # The second network's weights were in the mean alone.
    assert [part["name"] for part in read_summary(run)["mix"]] == ["network 1", "counts"]
    assert main(["train", "--resume", "--run", str(run)]) == 0
    assert "nothing left to train" in capsys.readouterr().out


def test_other_libraries_get_the_first_network_and_it_is_said(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(whole), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert "its first network alone is exported" in capsys.readouterr().out
    exported = probabilities(tmp_path / "hf")
    alone = probabilities(whole, alone=True)
    assert max(abs(a - b) for a, b in zip(alone, exported, strict=True)) < 1e-5


def test_a_run_starts_from_its_first_network(corpus: Path, whole: Path, tmp_path: Path) -> None:
    args = ["train", str(corpus), "--train.init_from", str(whole), "--run", str(tmp_path / "run")]
    assert main([*args, "--train.steps", "1", "--train.batch_tokens", "256"]) == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert f"init_from: {whole}/{read_summary(whole)['checkpoint']}" in config


def test_the_overlap_of_its_text_is_in_the_report_of_the_run(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "report.html").unlink()
    assert main(["evaluate", str(run), "--overlap"]) == 0
    overlap = json.loads((run / "overlap.json").read_text())
    assert overlap["checkpoint"].startswith("mix/checkpoints/")
    assert "the mean of network 1" in (run / "report.html").read_text()


def test_minutes_are_divided_among_the_networks(corpus: Path, tmp_path: Path) -> None:
    """An epoch takes a second or two, so several networks fit into a quarter of a minute."""
    run = tmp_path / "run"
    args = ["train", str(corpus), *TINY, "--train.minutes", "0.2", "--train.members", "2"]
    assert main([*args, "--run", str(run)]) == 0
    summary = read_summary(run)
    assert [part["name"] for part in summary["mix"]] == ["network 1", "network 2", "counts"]
    alone = [summary, read_summary(run / "members" / "2")]
    assert summary["minutes"] > alone[1]["minutes"] > 0
    assert summary["minutes"] < 0.2 * 1.5


@pytest.mark.parametrize(
    ("n_fitting", "rows", "processes", "expected"),
    [
        (0.4, 1024, 1, 1),
        (3.9, 1024, 1, 3),
        (2.3, 1024, 1, 1),
        (6.5, 1024, 1, 4),
        (6.5, 131_072, 1, 4),
        (8.0, 131_072, 1, 2),
        (100.0, 1024, 1, 8),
        (3.9, 1024, 2, 1),
    ],
)
def test_as_many_networks_as_have_time_and_memory(
    n_fitting: float, rows: int, processes: int, expected: int
) -> None:
    config = compose(
        [
            {
                "model": {"family": "fast", "ngram_rows": rows, "longest_ngram": 6},
                "parallel": {"processes": processes},
            }
        ]
    )

    manifest, stream = SimpleNamespace(vocab_size=512), SimpleNamespace(n_tokens=200_000)
    data: Any = SimpleNamespace(manifest=manifest, split=lambda name: stream)
    assert fit_members(config, data, n_fitting) == expected


@pytest.mark.parametrize(
    ("n_tokens", "rows"),
    [(100, 1024), (45_000, 8192), (200_000, 32_768), (10**6, 131_072), (10**9, 131_072)],
)
def test_tables_are_as_large_as_the_text_can_fill(n_tokens: int, rows: int) -> None:
    assert fit_table_rows(n_tokens) == rows


def test_a_network_with_time_for_many_epochs_has_dropout_and_no_tables() -> None:
    model = {"family": "fast", "ngram_rows": 1024}
    config = compose(
        [{"model": model, "train": {"minutes": 20.0, "members": 2, "batch_tokens": 512}}]
    )
    first = {"minutes": 1.0, "epochs": 1.0, "tokens": 200_000}
    settings = member_settings(config, [first])
    assert settings["model"] == {"ngram_rows": 0, "dropout": 0.2}
    assert settings["train"]["minutes"] == 16.0  # another epoch stops paying there
    assert settings["train"]["batch_tokens"] == 2048
    few = member_settings(config, [{"minutes": 5.0, "epochs": 1.0, "tokens": 200_000}])
    assert few["train"]["minutes"] == 15.0
    assert "model" not in few
    # Of a larger text fewer epochs are as many tokens.
    large = member_settings(config, [{"minutes": 5.0, "epochs": 1.0, "tokens": 10**6}])
    assert large["model"] == {"ngram_rows": 0, "dropout": 0.1}
    larger = member_settings(config, [{"minutes": 5.0, "epochs": 1.0, "tokens": 4 * 10**6}])
    assert larger["model"] == {"ngram_rows": 0, "dropout": 0.05}
    own = replace(config, model=replace(config.model, dropout=0.3))
    assert member_settings(own, [first])["model"]["dropout"] == 0.3


def test_networks_end_when_another_one_does_not_pay(whole: Path, tmp_path: Path) -> None:
    """A copy of the first network adds nothing to it."""
    alone = shutil.ignore_patterns("members", "mix")
    stored = read_run_config(whole)
    made: list[str] = []
    said: list[str] = []

    def copy(folder: Path, settings: object, name: str) -> int:
        shutil.copytree(whole, folder, ignore=alone)
        made.append(name)
        return 0

    def train(name: str, minutes: float | None) -> int:
        run = shutil.copytree(whole, tmp_path / name, ignore=alone)
        own = replace(stored.train, members=4, minutes=minutes)
        return train_members(run, replace(stored, train=own), copy, said.append)

    assert train("timed", 1.0) == 0
    assert made == ["network 2 of 4: other random weights"]
    assert re.match(r"network 2 has taken -?0\.0\d % off the loss of the mean", said[0])
    assert said[1:] == ["another network does not pay, so the run ends before its minutes do"]
    # After the mean was made, which deletes their checkpoints, as `extend` finds it.
    shutil.rmtree(tmp_path / "timed/members/2/checkpoints")
    own = replace(stored.train, members=4, minutes=1.0)
    assert train_members(tmp_path / "timed", replace(stored, train=own), copy, said.append) == 0
    assert len(made) == 1
    assert len(said) == 2
    # A number of networks that was asked for, with a number of steps, is kept.
    assert train("counted", None) == 0
    assert len(made) == 1 + 3


def test_several_processes_do_not_wait_for_a_network_that_one_of_them_trains(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", str(corpus), *TINY, *PARTS, "--run", str(tmp_path / "run")]
    assert main([*args, "--parallel.processes", "2"]) != 0
    captured = capsys.readouterr()
    assert "average runs afterwards: pretrain mix" in captured.out + captured.err


def test_a_run_of_several_networks_is_not_resumed_in_several_processes(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", "--run", str(whole), "--parallel.processes", "2"]) != 0
    captured = capsys.readouterr()
    assert "in 2 processes they must be 1 and 0" in captured.out + captured.err
