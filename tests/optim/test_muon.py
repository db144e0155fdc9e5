"""Muon: updates are nearly orthogonal, of AdamW's size, the same in a stack, and for hidden
matrices alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pretrain.model.config import ModelConfig, model_defaults
from pretrain.model.decoder import build
from pretrain.optim.config import OptimizerConfig
from pretrain.optim.muon import orthogonalize
from pretrain.optim.param_groups import build_optimizer, role_of, set_learning_rate


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_orthogonalize_approximates_the_polar_factor(shape: tuple[int, int]) -> None:
    stack = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    directions = orthogonalize(stack)
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    polar = left @ right
    # Same directions, singular values within a band around 1: enough for an update.
    cosine = (directions * polar).sum((1, 2)) / (
        directions.norm(dim=(1, 2)) * polar.norm(dim=(1, 2))
    )
    assert float(cosine.min()) > 0.98
    values = torch.linalg.svdvals(directions)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


def test_a_stack_equals_its_matrices_at_any_scale() -> None:
    stack = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))
    expected = orthogonalize(stack)
    for i in range(3):
        torch.testing.assert_close(orthogonalize(stack[i : i + 1])[0], expected[i])
    torch.testing.assert_close(orthogonalize(1000 * stack), expected, rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(orthogonalize(torch.zeros(1, 4, 4))).all())


@pytest.mark.parametrize("shape", [(80, 96), (96, 80)])
def test_onednn_orthogonalizes_as_torch(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    found = []
    for is_preferred in (False, torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        monkeypatch.setattr("pretrain.compat._prefers_onednn", lambda now=is_preferred: now)
        found.append(orthogonalize(stack))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_row_norm_ignores_the_length_of_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    stack, sizes = torch.randn(3, 8, 12, generator=generator), torch.rand(3, 8, 1) + 0.1
    expected = orthogonalize(stack / stack.norm(dim=2, keepdim=True))
    for scaled in (stack, stack * sizes):
        torch.testing.assert_close(orthogonalize(scaled, row_norm=True), expected)
    assert bool(torch.isfinite(orthogonalize(torch.zeros(1, 4, 4), row_norm=True)).all())


def test_muon_updates_hidden_matrices_only() -> None:
    config = ModelConfig(d_model=32, n_heads=2, n_layers=1, context_length=8, ngram_rows=16)
    decoder = build(config, vocab_size=50, seed=1)
    names = [name for name, p in decoder.named_parameters() if role_of(name, p) == "hidden"]
    kinds = "attention.query attention.key attention.value attention.output"
    expected = [*kinds.split(), "feed_forward.gate", "feed_forward.up", "feed_forward.down"]
    assert sorted(names) == sorted(f"blocks.0.{kind}.weight" for kind in expected)
    for name, p in decoder.named_parameters():
        # The names of an LMLoss have a prefix; the role is the same.
        assert role_of(f"decoder.{name}", p) == role_of(name, p)


def test_a_muon_update_equals_its_formula_and_embeddings_have_their_own_lr() -> None:
    config = OptimizerConfig(
        name="muon", learning_rate=0.02, embedding_lr_mult=4.0, weight_decay=0.5, epsilon=1e-12
    )
    decoder = build(
        ModelConfig(d_model=32, n_heads=2, n_layers=1, context_length=8), vocab_size=50, seed=1
    )
    optimizer = build_optimizer(decoder.named_parameters(), config=config)
    set_learning_rate(optimizer, 0.01)
    matrix = decoder.get_parameter("blocks.0.feed_forward.up.weight")
    table, norm = decoder.token_embedding.weight, decoder.get_parameter("final_norm.weight")
    before = [p.detach().clone() for p in (matrix, table, norm)]
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(matrix.shape, generator=generator)
    for p in decoder.parameters():
        p.grad = torch.ones_like(p)
    matrix.grad = gradient.clone()
    optimizer.step()
    momentum = (1 - config.momentum) * gradient
    nesterov = (1 - config.momentum) * gradient + config.momentum * momentum
    size = 0.2 * math.sqrt(max(matrix.shape))
    expected = before[0] * (1 - 0.01 * 0.5) - 0.01 * size * orthogonalize(nesterov[None])[0]
    torch.testing.assert_close(matrix.detach(), expected)
    # The root mean square of the update is that of AdamW, 0.2 of the learning rate.
    step = before[0] * (1 - 0.01 * 0.5) - matrix.detach()
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.2)
    # AdamW's first update is the learning rate times the sign of the gradient.
    torch.testing.assert_close(table.detach(), before[1] * (1 - 0.04 * 0.5) - 0.04)
    torch.testing.assert_close(norm.detach(), before[2] - 0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_second_update_has_nesterov_momentum(precision: str) -> None:
    """After the first update momentum and gradient are still parallel."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = OptimizerConfig(name="muon", weight_decay=0.0)
    shape = ModelConfig(d_model=32, n_heads=2, n_layers=1, context_length=8)
    decoder = build(shape, vocab_size=50, seed=1)
    optimizer = build_optimizer(decoder.named_parameters(), config=config, precision=precision)
    set_learning_rate(optimizer, 0.01)
    matrix = decoder.get_parameter("blocks.0.feed_forward.up.weight")
    generator = torch.Generator().manual_seed(3)
    momentum = torch.zeros(matrix.shape)
    for _ in range(2):
        before = matrix.detach().clone()
        for p in decoder.parameters():
            p.grad = torch.zeros_like(p)
        gradient = torch.randn(matrix.shape, generator=generator)
        matrix.grad = gradient.clone()
        optimizer.step()
        momentum = config.momentum * momentum + (1 - config.momentum) * gradient
        nesterov = config.momentum * momentum + (1 - config.momentum) * gradient
        size = 0.01 * 0.2 * math.sqrt(max(matrix.shape))
        expected = before - size * orthogonalize(nesterov[None], dtype=dtype)[0]
        torch.testing.assert_close(matrix.detach(), expected)


@pytest.mark.parametrize(("name", "scale"), [("muon", 0.5), ("adamw", 0.25)])
def test_base_width_scales_the_lrs_of_hidden_matrices_and_head(name: Any, scale: float) -> None:
    """Muon's update has a spectral norm that grows with the root of the width, AdamW's with it."""
    sizes = {"d_model": 256, "n_heads": 4, "ngram_rows": 8, "longest_ngram": 2}
    settings = {**model_defaults({"family": "fast"}), **sizes, "context_length": 16}
    decoder = build(ModelConfig(**settings), vocab_size=50, seed=1)

    def lrs(base_width: int | None, width: int | None = 256) -> dict[str, float]:
        config = OptimizerConfig(name=name, learning_rate=1e-2, base_width=base_width)
        optimizer = build_optimizer(decoder.named_parameters(), config=config, width=width)
        set_learning_rate(optimizer, 1e-2)
        by_parameter = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        return {n: by_parameter[p] for n, p in decoder.named_parameters()}

    unscaled, scaled = lrs(None), lrs(64)
    assert lrs(256) == unscaled
    for parameter, weight in decoder.named_parameters():
        is_scaled = role_of(parameter, weight) in ("hidden", "head")
        expected = unscaled[parameter] * (scale if is_scaled else 1.0)
        assert scaled[parameter] == pytest.approx(expected), parameter
    with pytest.raises(ValueError, match="width must be given with base_width 64"):
        lrs(64, width=None)


def test_base_batch_tokens_scales_all_lrs_by_the_root_of_the_batch() -> None:
    settings = {**model_defaults({"family": "fast"}), "size": 1, "context_length": 16}
    decoder = build(
        ModelConfig(**{**settings, "ngram_rows": 8, "longest_ngram": 2}), vocab_size=50, seed=1
    )

    def lrs(base_batch_tokens: int | None, batch_tokens: int) -> list[float]:
        config = OptimizerConfig(
            name="muon", learning_rate=1e-2, base_batch_tokens=base_batch_tokens
        )
        optimizer = build_optimizer(
            decoder.named_parameters(), config=config, batch_tokens=batch_tokens
        )
        set_learning_rate(optimizer, 1e-2)
        return [group["lr"] for group in optimizer.param_groups]

    unscaled = lrs(None, 4096)
    assert len(unscaled) == 5
    assert lrs(None, 1024) == lrs(4096, 4096) == unscaled
    assert lrs(1024, 4096) == pytest.approx([2 * lr for lr in unscaled])
    assert lrs(4096, 1024) == pytest.approx([lr / 2 for lr in unscaled])
