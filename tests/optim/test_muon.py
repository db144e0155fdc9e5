"""Muon: updates are nearly orthogonal, of AdamW's size, the same in a stack, and for hidden
matrices alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pretrain.model import ModelConfig, build
from pretrain.model.config import model_defaults
from pretrain.optim import OptimizerConfig, build_optimizer
from pretrain.optim.muon import orthogonalize
from pretrain.optim.param_groups import role_of, set_learning_rate


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_orthogonalize_comes_near_the_polar_factor(shape: tuple[int, int]) -> None:
    stack = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(stack)
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    polar = left @ right
    # Same directions, singular values within a band around 1: enough for an update.
    cosine = (found * polar).sum((1, 2)) / (found.norm(dim=(1, 2)) * polar.norm(dim=(1, 2)))
    assert float(cosine.min()) > 0.98
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


def test_a_stack_is_its_members_and_scale_does_not_matter() -> None:
    stack = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))
    whole = orthogonalize(stack)
    for i in range(3):
        torch.testing.assert_close(orthogonalize(stack[i : i + 1])[0], whole[i])
    torch.testing.assert_close(orthogonalize(1000 * stack), whole, rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(orthogonalize(torch.zeros(1, 4, 4))).all())


def test_embeddings_and_head_are_left_to_adamw() -> None:
    config = ModelConfig(d_model=32, n_heads=2, n_layers=1, context_length=8, ngram_rows=16)
    decoder = build(config, vocab_size=50, seed=1)
    names = [name for name, p in decoder.named_parameters() if role_of(name, p) == "hidden"]
    kinds = "attention.query attention.key attention.value attention.output"
    expected = [*kinds.split(), "feed_forward.gate", "feed_forward.up", "feed_forward.down"]
    assert sorted(names) == sorted(f"blocks.0.{kind}.weight" for kind in expected)
    for name, p in decoder.named_parameters():
        # An objective's names have a prefix; the role is the same.
        assert role_of(f"decoder.{name}", p) == role_of(name, p)


def test_an_update_is_the_formula_and_embeddings_take_their_own_rate() -> None:
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
    memory = (1 - config.momentum) * gradient
    ahead = (1 - config.momentum) * gradient + config.momentum * memory
    size = 0.2 * math.sqrt(max(matrix.shape))
    expected = before[0] * (1 - 0.01 * 0.5) - 0.01 * size * orthogonalize(ahead[None])[0]
    torch.testing.assert_close(matrix.detach(), expected)
    # Root mean square of the step: that of AdamW's, 0.2 of the rate.
    step = before[0] * (1 - 0.01 * 0.5) - matrix.detach()
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.2)
    # AdamW's first step is the rate times the sign of the gradient.
    torch.testing.assert_close(table.detach(), before[1] * (1 - 0.04 * 0.5) - 0.04)
    torch.testing.assert_close(norm.detach(), before[2] - 0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_momentum_looks_ahead(precision: str) -> None:
    """On the second step: after the first, memory and gradient still point the same way."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = OptimizerConfig(name="muon", weight_decay=0.0)
    shape = ModelConfig(d_model=32, n_heads=2, n_layers=1, context_length=8)
    decoder = build(shape, vocab_size=50, seed=1)
    optimizer = build_optimizer(decoder.named_parameters(), config=config, precision=precision)
    set_learning_rate(optimizer, 0.01)
    matrix = decoder.get_parameter("blocks.0.feed_forward.up.weight")
    generator = torch.Generator().manual_seed(3)
    memory = torch.zeros(matrix.shape)
    for _ in range(2):
        before = matrix.detach().clone()
        for p in decoder.parameters():
            p.grad = torch.zeros_like(p)
        gradient = torch.randn(matrix.shape, generator=generator)
        matrix.grad = gradient.clone()
        optimizer.step()
        memory = config.momentum * memory + (1 - config.momentum) * gradient
        ahead = config.momentum * memory + (1 - config.momentum) * gradient
        size = 0.01 * 0.2 * math.sqrt(max(matrix.shape))
        expected = before - size * orthogonalize(ahead[None], dtype=dtype)[0]
        torch.testing.assert_close(matrix.detach(), expected)


@pytest.mark.parametrize(("name", "scale"), [("muon", 0.5), ("adamw", 0.25)])
def test_rates_that_were_found_at_one_width_follow_another(name: Any, scale: float) -> None:
    """Muon's update has a spectral norm that grows with the root of the width, AdamW's with it."""
    sizes = {"d_model": 256, "n_heads": 4, "ngram_rows": 8, "longest_ngram": 2}
    given = {**model_defaults({"family": "fast"}), **sizes, "context_length": 16}
    decoder = build(ModelConfig(**given), vocab_size=50, seed=1)

    def rates(base_width: int | None, width: int | None = 256) -> dict[str, float]:
        chosen = OptimizerConfig(name=name, learning_rate=1e-2, base_width=base_width)
        optimizer = build_optimizer(decoder.named_parameters(), config=chosen, width=width)
        set_learning_rate(optimizer, 1e-2)
        by_parameter = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        return {n: by_parameter[p] for n, p in decoder.named_parameters()}

    plain, followed = rates(None), rates(64)
    assert rates(256) == plain
    for parameter, weight in decoder.named_parameters():
        follows = role_of(parameter, weight) in ("hidden", "head")
        expected = plain[parameter] * (scale if follows else 1.0)
        assert followed[parameter] == pytest.approx(expected), parameter
    with pytest.raises(ValueError, match="not the width"):
        rates(64, width=None)


def test_rates_that_were_found_with_one_batch_grow_with_the_root_of_another() -> None:
    given = {**model_defaults({"family": "fast"}), "size": 1, "context_length": 16}
    decoder = build(
        ModelConfig(**{**given, "ngram_rows": 8, "longest_ngram": 2}), vocab_size=50, seed=1
    )

    def rates(tuned: int | None, batch_tokens: int) -> list[float]:
        config = OptimizerConfig(name="muon", learning_rate=1e-2, base_batch_tokens=tuned)
        optimizer = build_optimizer(
            decoder.named_parameters(), config=config, batch_tokens=batch_tokens
        )
        set_learning_rate(optimizer, 1e-2)
        return [group["lr"] for group in optimizer.param_groups]

    plain = rates(None, 4096)
    assert len(plain) == 5
    assert rates(None, 1024) == rates(4096, 4096) == plain
    assert rates(1024, 4096) == pytest.approx([2 * rate for rate in plain])
    assert rates(4096, 1024) == pytest.approx([rate / 2 for rate in plain])
