"""AdamW equals its formula, matrices alone decay, gradients are clipped, state goes by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pretrain.optim.config import OptimizerConfig
from pretrain.optim.param_groups import (
    build_optimizer,
    clip_gradients,
    optimizer_state,
    restore_optimizer_state,
    set_learning_rate,
)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"weight_decay": -0.1},
        {"beta1": 1.0},
        {"clip": -1.0},
        {"epsilon": 0.0},
    ],
)
def test_out_of_range_settings_are_rejected_by_name(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(settings))} is"):
        OptimizerConfig(**settings)  # type: ignore[arg-type]


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()


def test_adamw_equals_its_formula_and_decays_matrices_only() -> None:
    model = small_model()
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
            direction = (first[name] / (1 - 0.8**step)) / (
                (second[name] / (1 - 0.9**step)).sqrt() + 1e-6
            )
            value.sub_(0.05 * direction)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), start[name], rtol=1e-10, atol=1e-12)


def test_clipping_scales_the_joint_norm_to_max_norm() -> None:
    model = small_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = clip_gradients(model.parameters(), max_norm=0.5)
    assert norm == pytest.approx(math.sqrt(sum(p.numel() for p in model.parameters())))
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert float(torch.nn.utils.get_total_norm(after)) == pytest.approx(0.5, rel=1e-12)
    assert clip_gradients(model.parameters(), max_norm=0.0) == pytest.approx(0.5)
    assert clip_gradients(model.parameters(), max_norm=9.0) == pytest.approx(0.5)


def test_clipping_does_not_spread_a_nan_to_other_gradients() -> None:
    model = small_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first = next(model.parameters())
    assert first.grad is not None
    first.grad[0, 0] = math.nan
    assert math.isnan(clip_gradients(model.parameters(), max_norm=0.1))
    n_nan = sum(int(torch.isnan(p.grad).sum()) for p in model.parameters() if p.grad is not None)
    assert n_nan == 1


def test_a_restored_optimizer_continues_bit_for_bit() -> None:
    config = OptimizerConfig()

    def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, math.sin(step + i))
            optimizer.step()

    uninterrupted = small_model()
    advance(
        uninterrupted, build_optimizer(uninterrupted.named_parameters(), config=config), range(6)
    )
    first = small_model()
    optimizer = build_optimizer(first.named_parameters(), config=config)
    advance(first, optimizer, range(3))
    state = {k: v.clone() for k, v in optimizer_state(optimizer, first.named_parameters()).items()}
    assert {k.rsplit("/")[-1] for k in state} == {"exp_avg", "exp_avg_sq", "step"}
    second = small_model()
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second.named_parameters(), config=config)
    restore_optimizer_state(resumed, second.named_parameters(), state)
    advance(second, resumed, range(3, 6))
    for a, b in zip(uninterrupted.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
