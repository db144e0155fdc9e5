"""Fused functions and oneDNN's matmul equal torch's own operators, gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oracles import config_of
from pretrain import compat
from pretrain.model import fused, layers
from pretrain.model.layers import attention, reference_attention, rope_cos_sin


@pytest.mark.parametrize("epsilon", [None, 0.3])
def test_fused_functions_and_their_gradients_equal_torchs(
    epsilon: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(3, 5, 4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    x = leaf.transpose(1, 2)  # the layout of queries and keys
    weight = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 4, 5, 8, generator=generator, dtype=torch.float64)
    angles = rope_cos_sin(torch.arange(5), config_of("llama"))

    def outputs_and_gradients() -> list[Any]:
        results: list[Any] = []
        for y in (
            fused.rms_norm(x, weight, epsilon),
            fused.rms_norm(x, None, epsilon),
            fused.squared_relu(x),
            fused.squared_relu(x, 0.5),
            fused.apply_rope(x, *angles),
        ):
            results += [y, *torch.autograd.grad(y, (leaf, weight), grad, allow_unused=True)]
        return results

    fused_results = outputs_and_gradients()
    with torch.no_grad():  # other code with the same bits
        assert torch.equal(fused.rms_norm(x, weight, epsilon), fused_results[0])
        assert torch.equal(fused.apply_rope(x, *angles), fused_results[12])

    monkeypatch.setattr(fused, "is_eager_cpu", lambda x: False)
    for actual, expected in zip(fused_results, outputs_and_gradients(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_squared_relu_is_the_square_of_the_larger_part(leak: float) -> None:
    x = torch.linspace(-3, 3, 10, dtype=torch.float64, requires_grad=True)
    found, expected = fused.squared_relu(x, leak), torch.maximum(x, leak * x).square()
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads)


def test_onednn_is_used_on_processors_other_than_intels(monkeypatch: pytest.MonkeyPatch) -> None:
    is_there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    for name, takes in (("Intel Xeon", False), ("AMD EPYC", is_there), (None, is_there)):
        known = {} if name is None else {"cpu_name": name}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert compat._prefers_onednn.__wrapped__() == takes


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_by_onednn_equals_torchs(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "MIN_ROWS", 1)
    is_there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(compat, "_prefers_onednn", lambda: is_there)
    generator = torch.Generator().manual_seed(0)
    # Not contiguous, as the output of attention.
    x = torch.randn(2, 3, 5, 24, generator=generator).transpose(1, 2).requires_grad_()
    weight = torch.randn(40, 24, generator=generator, requires_grad=True)
    bias = torch.randn(40, generator=generator, requires_grad=True) if has_bias else None
    leaves = (x, weight) if bias is None else (x, weight, bias)
    grad = torch.randn(2, 40, 5, 3, generator=generator).permute(0, 2, 3, 1)
    y = fused.linear(x, weight, bias)
    if is_there:
        assert type(y.grad_fn).__name__ == "_LinearBackward"
    actual = [y, *torch.autograd.grad(y, leaves, grad)]
    monkeypatch.setattr(compat, "_prefers_onednn", lambda: False)
    y = fused.linear(x, weight, bias)
    expected = [y, *torch.autograd.grad(y, leaves, grad)]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("width", [24, 40])
def test_weight_gradients_by_onednn_equal_a_plain_product(
    width: int, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(compat, "_prefers_onednn", lambda: is_there)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(fused, "COPIED_NUMBERS", 64 * 40)
    monkeypatch.setattr(fused, "MIN_COPIED_ROWS", 64)  # the last part has fewer
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(150, 32, generator=generator),
        torch.randn(150, width, generator=generator),
    )
    torch.testing.assert_close(fused.weight_gradient(grad, x), grad.T @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_keys", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_in_training_equals_a_plain_one(
    dtype: torch.dtype, n_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "prefers_causal_attention", lambda query: torch.is_grad_enabled())
    generator = torch.Generator().manual_seed(0)
    T = 300  # two blocks and a part of one
    heads = (4, n_keys, n_keys)
    qkv = [torch.randn(2, T, n, 16, generator=generator, dtype=torch.float64) for n in heads]
    qkv = [each.to(dtype).transpose(1, 2).requires_grad_() for each in qkv]
    grad = torch.randn(2, 4, T, 16, generator=generator, dtype=torch.float64).to(dtype)
    actual = attention(*qkv)
    assert actual.dtype == dtype
    assert type(actual.grad_fn).__name__ == "_CausalAttentionBackward"
    gradients = torch.autograd.grad(actual, qkv, grad)

    wide = [each.detach().double().requires_grad_() for each in qkv]
    ones = torch.ones(2, 4, T, T, dtype=torch.float64)
    expected = reference_attention(wide[0], wide[1], wide[2], ones)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    pairs = zip(
        (actual, *gradients),
        (expected, *torch.autograd.grad(expected, wide, grad.double())),
        strict=True,
    )
    for one, other in pairs:
        assert one.dtype == dtype
        scale = float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * scale)
    with torch.no_grad():  # by torch's kernel
        one = attention(*qkv)
        torch.testing.assert_close(one.double(), expected, rtol=0, atol=tolerance * 4)
    # Under autocast the blocks are in bfloat16, whatever the queries are in.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*qkv).dtype == torch.bfloat16


def test_attention_in_training_does_not_look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "prefers_causal_attention", lambda query: query.shape[2] > 1)
    qkv = [torch.randn(1, 2, 260, 16).requires_grad_() for _ in range(3)]
    y = attention(*qkv)
    d_query, *d_others = torch.autograd.grad(y[:, :, 130].sum(), qkv)
    assert not d_query[:, :, 131:].any()
    assert not d_query[:, :, :130].any()
    for each in d_others:
        assert not each[:, :, 131:].any()
        assert bool(each[:, :, :131].any())
    one = [each[:, :, :1] for each in qkv]
    torch.testing.assert_close(attention(*one), one[2])
