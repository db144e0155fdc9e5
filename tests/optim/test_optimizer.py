"""Schedules as functions of the step, AdamW against its formula, decay groups, clipping, state by
name."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    clip_gradients,
    lr_fraction_at,
)
from pretrain.optim.param_groups import optimizer_state, restore_optimizer_state, set_learning_rate
from pretrain.optim.schedule import LRSchedule, anneal, compare_schedules, extend, schedule_table

NAMES = ["cosine", "linear", "wsd", "constant", "inverse_sqrt"]


def curve(name: str, steps: int = 100, warmup: int = 10, **changes: float) -> list[float]:
    config = ScheduleConfig(name=name, warmup_steps=warmup, **changes)  # type: ignore[arg-type]
    return [lr_fraction_at(s, config=config, steps=steps) for s in range(steps)]


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_rises_to_one_and_never_exceeds_it(name: str) -> None:
    rates = curve(name)
    assert rates[:10] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert max(rates) <= 1.0
    assert rates[10] == pytest.approx(1.0)
    assert all(r > 0 for r in rates)
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[10:]))


def test_the_shapes_are_what_their_names_say() -> None:
    assert curve("linear")[55] == pytest.approx(0.5)
    assert curve("cosine")[55] == pytest.approx(0.5)
    assert curve("cosine", final_fraction=0.1)[-1] == pytest.approx(0.1, abs=1e-3)
    assert curve("wsd", decay_fraction=0.4)[60] == pytest.approx(1.0)
    assert curve("wsd", decay_fraction=0.4)[80] == pytest.approx(0.5)
    assert curve("wsd", decay_fraction=0.4)[-1] == pytest.approx(1 / 40)
    # A warm-up that reaches into the decay is not cut off: no step falls from the peak.
    late = curve("wsd", warmup=90, decay_fraction=0.6)
    assert late[90] == pytest.approx(1.0)
    assert max(a - b for a, b in pairwise(late)) < 0.11
    assert curve("inverse_sqrt")[43] == pytest.approx(0.5)
    assert curve("linear", warmup=0)[0] == 1.0


def ended(name: str, **changes: Any) -> LRSchedule:
    config = ScheduleConfig(name=name, warmup_steps=10, **changes)  # type: ignore[arg-type]
    return LRSchedule(config, 3e-3, 100)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("peak", [3e-3, 7e-4])
def test_an_extension_keeps_every_old_rate_and_begins_at_the_last(name: str, peak: float) -> None:
    old = ended(name)
    new = extend(old, done=100, steps=180, given={"learning_rate": peak})
    rates = [new.at(step) for step in range(180)]
    assert rates[:100] == [3e-3 * share for share in curve(name)]  # to the last bit
    # The warm-up goes in even steps from the last old rate to the peak.
    ramp = [rates[99] + (peak - rates[99]) * (i + 1) / 11 for i in range(10)]
    assert rates[100:110] == pytest.approx(ramp)
    # What follows is the run's own shape, over the added steps alone.
    assert rates[110:] == pytest.approx([peak * share for share in curve(name, steps=80)[10:]])
    again = extend(new, done=180, steps=220, given={})
    assert [again.at(step) for step in range(180)] == rates


def test_a_constant_rate_stays_where_it_is() -> None:
    new = extend(ended("constant"), done=100, steps=101, given={})
    assert [new.at(step) for step in range(10, 101)] == [3e-3] * 91


@pytest.mark.parametrize(
    ("name", "changes"),
    [("constant", {}), ("inverse_sqrt", {}), ("cosine", {"final_fraction": 0.2})],
)
def test_an_annealing_is_a_line_from_the_last_rate(name: str, changes: dict[str, float]) -> None:
    old = ended(name, **changes)
    new = anneal(old, done=100, steps=140)
    last = old.at(99)
    assert [new.at(step) for step in range(100)] == [old.at(step) for step in range(100)]
    assert new.at(100) == pytest.approx(last)
    assert new.at(120) == pytest.approx(last / 2)
    assert new.at(139) == pytest.approx(last / 40)
    # The run's own shape is not forgotten.
    longer = extend(new, done=140, steps=200, given={})
    assert longer.schedule.name == name
    assert longer.schedule.final_fraction == old.schedule.final_fraction
    assert longer.at(149) < longer.at(150) == pytest.approx(3e-3)
    assert [longer.at(step) for step in range(140)] == [new.at(step) for step in range(140)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_nothing_is_annealed_from_zero(name: str) -> None:
    with pytest.raises(ValueError, match=rf"has fallen to 0 already \({name}"):
        anneal(ended(name), done=100, steps=140)
    # One that patience stopped on its way has a rate left.
    assert anneal(ended(name), done=60, steps=140).at(60) == pytest.approx(ended(name).at(59))


def test_the_past_is_cut_where_a_checkpoint_is_older() -> None:
    old = ended("linear")
    new = extend(old, done=100, steps=180, given={})
    changed = LRSchedule(replace(new.schedule, history=new.history_until(40)), 1.0, 180)
    assert [part.until_step for part in changed.schedule.history] == [40]
    assert [changed.at(step) for step in range(40)] == [old.at(step) for step in range(40)]
    assert new.history_until(0) == ()
    assert [part.until_step for part in new.history_until(100)] == [100]
    assert [part.until_step for part in new.history_until(120)] == [100, 120]


def test_both_curves_are_shown_at_a_dozen_steps() -> None:
    old = ended("wsd")
    new = extend(old, done=100, steps=180, given={})
    rows = compare_schedules(old, new, done=100)
    assert len(rows) == 12
    assert [row["step"] for row in rows][::11] == [0, 179]
    assert all(row["new"] == new.at(int(row["step"] or 0)) for row in rows)
    assert [row["old"] for row in rows if (row["step"] or 0) >= 100] == [None] * 8
    lines = schedule_table(rows).splitlines()
    assert len(lines) == 13
    assert max(line.count("#") for line in lines) == 32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"origin_step": 5}, "are written by pretrain extend"),
        ({"anneal": True}, "are written by pretrain extend"),
        ({"start_fraction": math.nan}, "start_fraction is nan"),
        ({"history": ended("wsd").history_until(100) * 2}, r"until the steps \[100, 100\]"),
    ],
)
def test_a_past_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"weight_decay": -0.1},
        {"beta1": 1.0},
        {"clip": -1.0},
        {"epsilon": 0.0},
    ],
)
def test_wrong_numbers_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(wrong))} is"):
        OptimizerConfig(**wrong)  # type: ignore[arg-type]


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()


def test_adamw_is_the_published_formula_and_decays_matrices_only() -> None:
    model = make()
    config = OptimizerConfig(
        learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, epsilon=1e-6
    )
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model.named_parameters(), config=config)
    set_learning_rate(optimizer, 0.05)
    first = {n: torch.zeros_like(p) for n, p in start.items()}
    second = {n: torch.zeros_like(p) for n, p in start.items()}
    for step in (1, 2, 3):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.3 * (i + 1) / step)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        for name, value in start.items():
            g = gradients[name]
            decay = 0.5 if value.ndim >= 2 else 0.0
            value.mul_(1 - 0.05 * decay)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g * g
            rise = (first[name] / (1 - 0.8**step)) / (
                (second[name] / (1 - 0.9**step)).sqrt() + 1e-6
            )
            value.sub_(0.05 * rise)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), start[name], rtol=1e-10, atol=1e-12)


def test_clipping_scales_the_whole_gradient_to_the_limit() -> None:
    model = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = clip_gradients(model.parameters(), max_norm=0.5)
    assert norm == pytest.approx(math.sqrt(sum(p.numel() for p in model.parameters())))
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert float(torch.nn.utils.get_total_norm(after)) == pytest.approx(0.5, rel=1e-12)
    assert clip_gradients(model.parameters(), max_norm=0.0) == pytest.approx(0.5)
    assert clip_gradients(model.parameters(), max_norm=9.0) == pytest.approx(0.5)


def test_one_nan_does_not_spread_to_other_gradients() -> None:
    model = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first = next(model.parameters())
    assert first.grad is not None
    first.grad[0, 0] = math.nan
    assert math.isnan(clip_gradients(model.parameters(), max_norm=0.1))
    assert (
        int(sum(torch.isnan(p.grad).sum() for p in model.parameters() if p.grad is not None)) == 1
    )


def test_state_goes_out_and_comes_back_by_name() -> None:
    config = OptimizerConfig()

    def advance(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
        for step in range(n):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, math.sin(step + i))
            optimizer.step()

    whole = make()
    advance(whole, build_optimizer(whole.named_parameters(), config=config), 6)
    first = make()
    optimizer = build_optimizer(first.named_parameters(), config=config)
    advance(first, optimizer, 3)
    # `advance` counts from 0 again, so the second half must be driven by hand.
    state = {k: v.clone() for k, v in optimizer_state(optimizer, first.named_parameters()).items()}
    assert {k.rsplit("/")[-1] for k in state} == {"exp_avg", "exp_avg_sq", "step"}
    second = make()
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second.named_parameters(), config=config)
    restore_optimizer_state(resumed, second.named_parameters(), state)
    for step in range(3, 6):
        for i, p in enumerate(second.parameters()):
            p.grad = torch.full_like(p, math.sin(step + i))
        resumed.step()
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
