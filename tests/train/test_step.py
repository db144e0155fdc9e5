"""One step: the gradient of nats per target, whatever the micro-batch size."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from pretrain.config import compose
from pretrain.data.batches import IGNORE_INDEX, MicroBatch
from pretrain.distributed import open_world
from pretrain.model.config import ModelConfig, model_defaults
from pretrain.model.decoder import build
from pretrain.model.loss import LMLoss
from pretrain.optim.config import OptimizerConfig
from pretrain.optim.param_groups import build_optimizer
from pretrain.parallel.model import StepReport
from pretrain.train.step import training_steps
from runs import batches, small_lm_loss


@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"), [(torch.float32, 20, 1e-5), (torch.float64, 50, 1e-9)]
)
def test_micro_batch_size_does_not_change_losses(
    dtype: torch.dtype, steps: int, tolerance: float
) -> None:
    """DESIGN section 6: 20 steps in float32 within 1e-5 relative, 50 in float64 within 1e-9; with
    dropout."""
    curves = []
    for micro in (6, 2, 1):
        lm_loss = small_lm_loss(dropout=0.1).to(dtype)
        optimizer = build_optimizer(lm_loss.named_parameters(), config=OptimizerConfig())
        reports = training_steps(
            lm_loss,
            optimizer,
            lambda step, micro=micro: batches(6, micro, seed=step % 3),  # type: ignore[misc]
            lr_at=lambda step: 1e-2,
            steps=steps,
            clip=1.0,
            world=open_world("cpu", threads=1),
        )
        curves.append([r.nats_per_token for r in reports])
    assert curves[1] == pytest.approx(curves[0], rel=tolerance)
    assert curves[2] == pytest.approx(curves[0], rel=tolerance)
    assert curves[0][-1] < curves[0][0] - 0.5


def test_gradient_is_of_nats_per_target() -> None:
    """Divided once by all targets of the step; AdamW would hide another scale, not the norm."""
    lm_loss = small_lm_loss()
    nats, count = lm_loss(batches(6, 6)[0])
    gradients = torch.autograd.grad(nats / count, list(lm_loss.parameters()))
    expected = float(torch.nn.utils.get_total_norm(gradients))
    report = one_step(lm_loss, batches(6, 2))
    assert report.count == 6 * 8
    assert report.nats == pytest.approx(float(nats.detach()), rel=1e-6)
    assert report.grad_norm == pytest.approx(expected, rel=1e-5)


def masked(parts: list[tuple[int, int]]) -> list[MicroBatch]:
    """Micro-batches of 12 rows in all; the first 5 targets of every third row are ignored."""
    (whole,) = batches(12, 12)
    targets = whole.targets.clone()
    targets[::3, :5] = IGNORE_INDEX
    masked_batch = whole._replace(targets=targets)
    return [MicroBatch(*(part[a:b] for part in masked_batch)) for a, b in parts]


def one_step(lm_loss: LMLoss, micro_batches: list[MicroBatch], *, clip: float = 0.0) -> StepReport:
    optimizer = build_optimizer(lm_loss.named_parameters(), config=OptimizerConfig())
    reports = training_steps(
        lm_loss,
        optimizer,
        lambda step: micro_batches,
        lr_at=lambda step: 1e-2,
        steps=1,
        clip=clip,
        world=open_world("cpu", threads=1),
    )
    return next(reports)


def test_masks_and_unequal_rows_are_divided_once_by_number_of_valid_targets() -> None:
    found = []
    for parts in ([(0, 12)], [(0, 1), (1, 8), (8, 12)]):
        lm_loss = small_lm_loss().double()
        report = one_step(lm_loss, masked(parts))
        found.append((report, [p.detach().clone() for p in lm_loss.parameters()]))
    (one, weights), (other, other_weights) = found
    # torch's own mean over valid targets has the same gradient.
    (batch,), lm_loss = masked([(0, 12)]), small_lm_loss().double()
    logits = lm_loss.decoder.logits(lm_loss.decoder(batch.inputs))
    F.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX
    ).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in lm_loss.parameters() if p.grad is not None]
    assert one.grad_norm == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-9)
    assert one.count == other.count == 12 * 8 - 4 * 5
    assert other.nats_per_token == pytest.approx(one.nats_per_token, rel=1e-12)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-9)
    for a, b in zip(weights, other_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_batch_without_targets_makes_no_update() -> None:
    lm_loss = small_lm_loss()
    before = [p.detach().clone() for p in lm_loss.parameters()]
    (batch,) = batches(4, 4)
    empty = batch._replace(targets=torch.full_like(batch.targets, IGNORE_INDEX))
    report = one_step(lm_loss, [empty])
    assert (report.nats, report.count, report.is_usable) == (0.0, 0, False)
    assert report.nats_per_token == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, lm_loss.parameters(), strict=True))


def test_gradient_that_is_not_finite_makes_no_update() -> None:
    lm_loss = small_lm_loss()
    with torch.no_grad():
        lm_loss.decoder.get_parameter("final_norm.weight")[0] = math.inf
    before = [p.clone() for p in lm_loss.parameters()]
    report = one_step(lm_loss, batches(4, 2), clip=1.0)
    assert not math.isfinite(report.grad_norm)
    assert not report.is_usable
    assert all(torch.equal(a, b) for a, b in zip(before, lm_loss.parameters(), strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama", "fast"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_batch_can_be_memorised(family: str, name: str) -> None:
    chosen = compose(
        [{"model": {"family": family, "d_model": 32, "context_length": 8, "n_layers": 2}}]
    )
    lm_loss = LMLoss(build(chosen.model, vocab_size=50, seed=1))
    optimizer = build_optimizer(
        lm_loss.named_parameters(),
        config=OptimizerConfig(name=name, weight_decay=0.0),  # type: ignore[arg-type]
    )
    reports = training_steps(
        lm_loss,
        optimizer,
        lambda step: batches(4, 4),
        lr_at=lambda step: 1e-2,
        steps=120,
        world=open_world("cpu", threads=1),
    )
    losses = [r.nats_per_token for r in reports]
    assert losses[0] == pytest.approx(math.log(50), abs=0.2)
    assert losses[-1] < 0.1


def test_bf16_step_is_close_to_fp32_step() -> None:
    """Rounded to 8 bits: the loss, and how gradients lie."""
    world, losses, gradients = open_world("cpu", threads=1), [], []
    config = ModelConfig(**{**model_defaults({"family": "fast", "size": 1}), "context_length": 32})
    ids = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(3))
    targets = ids[:, 1:].clone()
    targets[1, 7:] = IGNORE_INDEX
    batch = MicroBatch(ids[:, :-1], targets, torch.arange(4))
    for precision in ("fp32", "bf16"):
        lm_loss = LMLoss(build(config, vocab_size=300, seed=1))
        with world.autocast(precision):
            nats, _ = lm_loss(batch)
        nats.backward()
        losses.append(float(nats.detach()))
        gradients.append({n: p.grad for n, p in lm_loss.named_parameters() if p.grad is not None})
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert gradients[0].keys() == gradients[1].keys()
    for name, exact in gradients[0].items():
        near = gradients[1][name]
        assert near.dtype == torch.float32
        exact, near = exact.to_dense().flatten(), near.to_dense().flatten()
        if exact.any():
            assert float((near - exact).norm() / exact.norm()) < 0.03, name
