"""Learning-rate schedules: shapes, continuation by extend and anneal, and their history."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from pretrain.optim.config import ScheduleConfig
from pretrain.optim.schedule import (
    LRSchedule,
    anneal,
    compare_schedules,
    extend,
    lr_fraction,
    schedule_table,
)

NAMES = ["cosine", "linear", "wsd", "constant", "inverse_sqrt"]


def fractions(name: str, steps: int = 100, warmup: int = 10, **changes: float) -> list[float]:
    config = ScheduleConfig(name=name, warmup_steps=warmup, **changes)  # type: ignore[arg-type]
    return [lr_fraction(s, config, steps) for s in range(steps)]


@pytest.mark.parametrize("name", NAMES)
def test_lr_rises_to_the_peak_in_the_warmup_and_then_falls(name: str) -> None:
    values = fractions(name)
    assert values[:10] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert max(values) <= 1.0
    assert values[10] == pytest.approx(1.0)
    assert all(value > 0 for value in values)
    assert all(a >= b - 1e-12 for a, b in pairwise(values[10:]))


def test_decay_shapes_have_their_known_values() -> None:
    assert fractions("linear")[55] == pytest.approx(0.5)
    assert fractions("cosine")[55] == pytest.approx(0.5)
    assert fractions("cosine", final_fraction=0.1)[-1] == pytest.approx(0.1, abs=1e-3)
    assert fractions("wsd", decay_fraction=0.4)[60] == pytest.approx(1.0)
    assert fractions("wsd", decay_fraction=0.4)[80] == pytest.approx(0.5)
    assert fractions("wsd", decay_fraction=0.4)[-1] == pytest.approx(1 / 40)
    # A warm-up that overlaps the decay shortens the decay: the peak is reached, without a jump.
    late = fractions("wsd", warmup=90, decay_fraction=0.6)
    assert late[90] == pytest.approx(1.0)
    assert max(a - b for a, b in pairwise(late)) < 0.11
    assert fractions("inverse_sqrt")[43] == pytest.approx(0.5)
    assert fractions("linear", warmup=0)[0] == 1.0


def finished(name: str, **changes: Any) -> LRSchedule:
    config = ScheduleConfig(name=name, warmup_steps=10, **changes)  # type: ignore[arg-type]
    return LRSchedule(config, 3e-3, 100)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("peak", [3e-3, 7e-4])
def test_extend_keeps_old_lrs_and_warms_up_from_the_last_one(name: str, peak: float) -> None:
    old = finished(name)
    new = extend(old, start_step=100, steps=180, overrides={"learning_rate": peak})
    lrs = [new.at(step) for step in range(180)]
    assert lrs[:100] == [3e-3 * fraction for fraction in fractions(name)]  # bit for bit
    # The warm-up is linear from the last old learning rate to the peak.
    ramp = [lrs[99] + (peak - lrs[99]) * (i + 1) / 11 for i in range(10)]
    assert lrs[100:110] == pytest.approx(ramp)
    # Afterwards the run's own shape covers the added steps.
    assert lrs[110:] == pytest.approx(
        [peak * fraction for fraction in fractions(name, steps=80)[10:]]
    )
    again = extend(new, start_step=180, steps=220, overrides={})
    assert [again.at(step) for step in range(180)] == lrs


def test_extend_keeps_a_constant_lr_without_a_warmup() -> None:
    new = extend(finished("constant"), start_step=100, steps=101, overrides={})
    assert [new.at(step) for step in range(10, 101)] == [3e-3] * 91


@pytest.mark.parametrize(
    ("name", "changes"),
    [("constant", {}), ("inverse_sqrt", {}), ("cosine", {"final_fraction": 0.2})],
)
def test_anneal_decays_linearly_from_the_last_lr(name: str, changes: dict[str, float]) -> None:
    old = finished(name, **changes)
    new = anneal(old, start_step=100, steps=140)
    last = old.at(99)
    assert [new.at(step) for step in range(100)] == [old.at(step) for step in range(100)]
    assert new.at(100) == pytest.approx(last)
    assert new.at(120) == pytest.approx(last / 2)
    assert new.at(139) == pytest.approx(last / 40)
    # A later extension has the run's own shape again.
    longer = extend(new, start_step=140, steps=200, overrides={})
    assert longer.schedule.name == name
    assert longer.schedule.final_fraction == old.schedule.final_fraction
    assert longer.at(149) < longer.at(150) == pytest.approx(3e-3)
    assert [longer.at(step) for step in range(140)] == [new.at(step) for step in range(140)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_anneal_rejects_a_run_that_reached_lr_0(name: str) -> None:
    with pytest.raises(ValueError, match=rf"has reached 0 already \({name}"):
        anneal(finished(name), start_step=100, steps=140)
    # A run that stopped early has not reached 0.
    assert anneal(finished(name), start_step=60, steps=140).at(60) == pytest.approx(
        finished(name).at(59)
    )


def test_history_ends_at_the_step_of_the_checkpoint() -> None:
    old = finished("linear")
    new = extend(old, start_step=100, steps=180, overrides={})
    changed = LRSchedule(replace(new.schedule, history=new.history_until(40)), 1.0, 180)
    assert [segment.until_step for segment in changed.schedule.history] == [40]
    assert [changed.at(step) for step in range(40)] == [old.at(step) for step in range(40)]
    assert new.history_until(0) == ()
    assert [segment.until_step for segment in new.history_until(100)] == [100]
    assert [segment.until_step for segment in new.history_until(120)] == [100, 120]


def test_old_and_new_lr_are_listed_at_12_steps() -> None:
    old = finished("wsd")
    new = extend(old, start_step=100, steps=180, overrides={})
    rows = compare_schedules(old, new, start_step=100)
    assert len(rows) == 12
    assert [row["step"] for row in rows][::11] == [0, 179]
    assert all(row["new"] == new.at(int(row["step"] or 0)) for row in rows)
    assert [row["old"] for row in rows if (row["step"] or 0) >= 100] == [None] * 8
    lines = schedule_table(rows).splitlines()
    assert len(lines) == 13
    assert max(line.count("#") for line in lines) == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"origin_step": 5}, "are written by pretrain extend"),
        ({"anneal": True}, "are written by pretrain extend"),
        ({"start_fraction": math.nan}, "start_fraction is nan"),
        (
            {"history": finished("wsd").history_until(100) * 2},
            r"to the steps \[100, 100\]; these must increase",
        ),
    ],
)
def test_an_impossible_history_is_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**settings)
