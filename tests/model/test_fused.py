"""Fused functions and oneDNN's matmul equal torch's own operators, gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oracles import config_of
from pretrain.model import fused
from pretrain.model.layers import rope_cos_sin


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

    monkeypatch.setattr(fused, "_is_eager_cpu", lambda x: False)
    for actual, expected in zip(fused_results, outputs_and_gradients(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_squared_relu_is_the_square_of_the_larger_part(slope: float) -> None:
    x = torch.linspace(-3, 3, 10, dtype=torch.float64, requires_grad=True)
    found, expected = fused.squared_relu(x, slope), torch.maximum(x, slope * x).square()
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads)


def test_onednn_is_used_on_processors_other_than_intels(monkeypatch: pytest.MonkeyPatch) -> None:
    is_there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    for name, takes in (("Intel Xeon", False), ("AMD EPYC", is_there), (None, is_there)):
        known = {} if name is None else {"cpu_name": name}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert fused._prefers_onednn.__wrapped__() == takes


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_by_onednn_equals_torchs(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MIN_ROWS", 1)
    is_there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(fused, "_prefers_onednn", lambda: is_there)
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
    monkeypatch.setattr(fused, "_prefers_onednn", lambda: False)
    y = fused.linear(x, weight, bias)
    expected = [y, *torch.autograd.grad(y, leaves, grad)]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
