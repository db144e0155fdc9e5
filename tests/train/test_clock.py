"""A run that was given minutes ends with them, whatever the machine does, and is exact."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clocked import Machine, decisions, in_one_of_two_processes
from clocked import train as train_by_clock
from pretrain.checkpoint.load import list_checkpoints
from pretrain.cli import main
from pretrain.optim.config import ScheduleConfig
from pretrain.optim.schedule import LRSchedule
from pretrain.train import clock as clock_module
from pretrain.train.clock import Clock
from pretrain.train.config import TrainConfig
from processes import Pool
from runs import Killed, assert_same_run, kill_in_step, records


def rates(run: Path) -> list[float]:
    """The learning rate of each step."""
    return [r["learning_rate"] for r in records(run) if r["kind"] == "train"]


def summary(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


MACHINES: dict[str, tuple[Callable[[float], float], str]] = {
    "as measured": (lambda t: 1.0, ""),
    "three times slower in the middle": (lambda t: 1.0 if t < 30 else 3.0, "slower"),
    "slower and slower": (lambda t: 1.0 if t < 28 else 1.5 if t < 45 else 2.2, "slower"),
    "faster in the middle": (lambda t: 1.0 if t < 30 else 0.4, "faster"),
    "suspended for 10 seconds": (lambda t: 10.0 if 35 <= t < 36 else 1.0, "slower"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_run_ends_with_its_minutes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, capsys: Any
) -> None:
    step_seconds, word = MACHINES[name]
    machine = Machine(step_seconds)
    machine.install(monkeypatch)
    run = tmp_path / "run"
    assert train_by_clock(corpus, run) == 0
    done = summary(run)
    assert done["minutes"] == pytest.approx(1, rel=0.05)
    assert done["steps"] == machine.n_steps == decisions(run)[-1]["steps"] == len(rates(run))
    peak, last = max(rates(run)), rates(run)[-1]
    assert last < 0.1 * peak
    assert word in done["clock"]
    assert bool(word) == bool(done["clock"])
    output = " ".join(capsys.readouterr().out.split())
    assert done["clock"] in output
    assert output.split(" done ")[0].count("the learning rate falls from") == bool(word), "once"
    assert done["clock"].split(":")[0] in " ".join((run / "report.html").read_text().split())


def test_a_trial_on_a_busy_machine_leaves_no_time_unused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the trial not even one step fits."""
    Machine(lambda t: 1.0).install(monkeypatch, measured=100.0)
    settings = ["--train.evaluate_every", "30"]
    assert train_by_clock(corpus, tmp_path / "run", *settings) == 0
    assert summary(tmp_path / "run")["minutes"] == pytest.approx(1, rel=0.05)


def test_a_run_killed_in_its_fall_has_the_rates_and_weights_of_one_that_was_not(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints are from before the fall, and the machine is much slower after the resume:
    what was decided holds for the steps that are made again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = ["--train.save_every", "18", "--train.evaluate_every", "18"]

    def slower(t: float) -> float:
        return 1.0 if t < 15 else 1.5

    with monkeypatch.context() as patch:
        Machine(slower).install(patch)
        assert train_by_clock(corpus, whole, *settings) == 0
    with monkeypatch.context() as patch:
        machine = Machine(slower)
        machine.install(patch)
        kill_in_step(patch, 31)
        with pytest.raises(Killed):
            train_by_clock(corpus, killed, *settings)
    assert [path.name for path in list_checkpoints(killed / "checkpoints")] == ["step-00000018"]
    before = decisions(killed)
    assert 18 < before[0]["step"] < 31
    first_rates = rates(killed)
    assert len(first_rates) == 30
    with monkeypatch.context() as patch:
        # The clock continues where the checkpoint was saved.
        Machine(slower, start=15 + 1.5 * 3).install(patch)
        assert main(["train", "--resume", "--run", str(killed)]) == 0
    assert rates(killed)[:30] == first_rates
    assert decisions(killed) == decisions(whole)
    assert_same_run(whole, killed)


def test_a_slower_machine_after_a_resume_changes_no_step_that_was_made(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    settings = ["--train.save_every", "10", "--train.evaluate_every", "10"]
    with monkeypatch.context() as patch:
        Machine(lambda t: 1.0).install(patch)
        kill_in_step(patch, 19)
        with pytest.raises(Killed):
            train_by_clock(corpus, run, *settings)
    assert decisions(run) == []
    first_rates = rates(run)
    with monkeypatch.context() as patch:
        Machine(lambda t: 3.0).install(patch)
        assert main(["train", "--resume", "--run", str(run)]) == 0
    assert rates(run)[:18] == first_rates
    assert decisions(run)[0]["step"] == 18
    assert summary(run)["minutes"] == pytest.approx(1, rel=0.05)


def test_a_decision_that_a_crash_has_cut_is_made_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    settings = ["--train.save_every", "15", "--train.evaluate_every", "15"]
    with monkeypatch.context() as patch:
        Machine(lambda t: 1.0 if t < 30 else 2.0).install(patch)
        kill_in_step(patch, 38)
        with pytest.raises(Killed):
            train_by_clock(corpus, run, *settings)
    whole = (run / "clock.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) >= 2
    (run / "clock.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    with monkeypatch.context() as patch:
        Machine(lambda t: 2.0).install(patch)
        assert main(["train", "--resume", "--run", str(run)]) == 0
    content = (run / "clock.jsonl").read_bytes()
    assert content.startswith(b"".join(lines[:-1]) + b"{")
    assert all(json.loads(line) for line in content.splitlines())
    assert summary(run)["steps"] == decisions(run)[-1]["steps"]


def test_two_processes_follow_the_clock_of_rank_0(corpus: Path, tmp_path: Path, pool: Pool) -> None:
    pool.run(2, in_one_of_two_processes, str(corpus), str(tmp_path / "run"))
    done = summary(tmp_path / "run")
    assert done["minutes"] == pytest.approx(1, rel=0.05)
    assert done["steps"] == decisions(tmp_path / "run")[-1]["steps"]


def test_a_run_of_changed_length_is_extended_from_its_last_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    Machine(lambda t: 1.0 if t < 15 else 3.0).install(monkeypatch)
    assert train_by_clock(corpus, run, "--schedule.final_fraction", "0.1") == 0
    made, before = summary(run)["steps"], rates(run)
    assert made < 45
    more = str(made + 20)
    assert main(["extend", str(run), "--train.steps", more, "--schedule.warmup_steps", "5"]) == 0
    assert summary(run)["steps"] == made + 20
    assert rates(run)[:made] == before
    assert max(rates(run)[made:]) == pytest.approx(max(before))
    assert main(["trace", str(run), "--step", more]) == 0
    # A resume of the extended run knows the rates of all steps: they are in config.yaml now.
    history = (run / "config.yaml").read_text()
    assert "anneal: true" in history


def test_a_number_of_steps_follows_no_clock(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(lambda t: 100.0).install(monkeypatch)
    assert train_by_clock(corpus, tmp_path / "run", "--train.steps", "30") == 0
    assert summary(tmp_path / "run")["steps"] == 30
    assert not (tmp_path / "run" / "clock.jsonl").exists()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


# --- the clock alone ------------------------------------------------------------------------------


def simulated(
    monkeypatch: pytest.MonkeyPatch,
    step_seconds: Callable[[float], float],
    *,
    planned: int,
    seconds: float = 1000.0,
    evaluation_seconds: float = 0.0,
    most_steps: int | None = None,
) -> tuple[float, list[float], list[dict[str, Any]]]:
    """The time, the rates and the decisions of a run on a machine."""
    now = 0.0
    monkeypatch.setattr(clock_module, "now", lambda: now)
    plan = LRSchedule(ScheduleConfig(warmup_steps=10), 1.0, planned)
    every = math.ceil(planned / 10)
    train = TrainConfig(minutes=seconds / 60, evaluate_every=every)
    clock = Clock(train, plan, most_steps, [])
    schedule, step, values = plan, 0, []
    while step < schedule.steps:
        if decision := clock.decide(step, schedule):
            clock.decisions.append(decision)
            schedule = plan.decided(clock.decisions)
        values.append(schedule.at(step))
        now += step_seconds(now)
        step += 1
        clock.end_step(step)
        if step % every == 0:
            now += evaluation_seconds
    return clock.used, values, clock.decisions


@pytest.mark.parametrize("seed", range(30))
def test_any_machine_keeps_its_minutes(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Its speed changes twice, by up to nine times; steps vary by 30 %, evaluations take time."""
    dice = random.Random(seed)
    paces = [3 ** dice.uniform(-1, 1) for _ in range(3)]
    first, second = sorted(dice.uniform(0, 1000) for _ in range(2))

    def step_seconds(t: float) -> float:
        pace = paces[0] if t < first else paces[1] if t < second else paces[2]
        return pace * dice.uniform(0.7, 1.3)

    used, values, _ = simulated(monkeypatch, step_seconds, planned=900, evaluation_seconds=10.0)
    assert used == pytest.approx(1000, rel=0.02)
    assert values[-1] < 0.05
    begin = values.index(1.0)
    assert all(a >= b for a, b in zip(values[begin:], values[begin + 1 :], strict=False))


def test_a_steady_machine_keeps_the_planned_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """So does one that is fast enough for the most steps that help."""
    plan = LRSchedule(ScheduleConfig(warmup_steps=10), 1.0, 1000)
    for machine, most in ((lambda t: 1.0, None), (lambda t: 0.1, 1000)):
        _, values, decided = simulated(monkeypatch, machine, planned=1000, most_steps=most)
        assert values == pytest.approx([plan.at(step) for step in range(1000)], abs=2e-3)
        assert len(decided) == 1


def test_a_rate_falls_although_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine slept until after the end: the rate takes 4 % of the minutes to fall."""
    used, values, _ = simulated(
        monkeypatch, lambda t: 1000.0 if 300 <= t < 301 else 1.0, planned=1000
    )
    fall = len(values) - 1 - max(i for i, value in enumerate(values) if value == 1.0)
    assert 30 <= fall <= 45
    assert used < 1.35 * 1000
    assert values[-1] < 0.05
