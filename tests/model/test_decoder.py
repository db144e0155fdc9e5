"""The decoder: causality, cache, context limit, initial weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import RowwiseParallel

from model_variants import VARIANTS, T, V, batch_of, random_variant, small_config
from oracles import config_of, random_decoder
from pretrain.model import fused
from pretrain.model.decoder import Decoder, build, initial_rows
from pretrain.model.families import FAMILIES
from pretrain.model.layers import KeyValueCache
from pretrain.model.loss import LMLoss
from pretrain.parallel.tensor import _STYLES, block_plan


@pytest.fixture(params=VARIANTS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """A small decoder of each variant in which every parameter has an effect."""
    return random_variant(request.param)


def test_logits_do_not_depend_on_later_tokens(decoder: Decoder) -> None:
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(0))
    before = decoder.logits(decoder(ids))
    for j in range(T):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 1) % V
        after = decoder.logits(decoder(changed))
        assert torch.equal(before[:, :j], after[:, :j])
        assert not torch.allclose(before[:, j:], after[:, j:])


def test_hidden_states_with_and_without_cache_agree(decoder: Decoder) -> None:
    decoder.double()
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(3))
    expected = decoder(ids)
    for cuts in ([5, 1, 1, 5], [1] * T, [3, 4, 5]):
        cache, parts, start = KeyValueCache(), [], 0
        for length in cuts:
            parts.append(decoder(ids[:, start : start + length], cache=cache))
            start += length
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-10, atol=1e-12)


def test_more_ids_than_the_context_are_rejected(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="13 ids do not fit the context: there must be at most 12"):
        decoder(torch.zeros(1, T + 1, dtype=torch.int64))


@pytest.mark.parametrize("family", ["gpt2", "llama", "fast"])
def test_layers_with_the_same_input_are_one_matmul_on_a_gpu(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(family, n_kv_heads=2) if family == "llama" else config_of(family)
    decoder = random_decoder(config, vocab_size=V).double()
    ids = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(4))
    results = []
    for joins in (False, True):
        monkeypatch.setattr(
            "pretrain.model.layers._prefers_one_matmul", lambda x, joins=joins: joins
        )
        loss, _ = LMLoss(decoder)(batch_of(ids))
        parameters = [p for n, p in decoder.named_parameters() if "ngrams" not in n]
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    for separate, concatenated in zip(*results, strict=True):
        torch.testing.assert_close(concatenated, separate, rtol=1e-10, atol=1e-10)
    weight_shapes = []

    def recorded(x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        weight_shapes.append(weight.shape)
        return fused.linear(x, weight, bias)

    monkeypatch.setattr("pretrain.model.layers.linear", recorded)
    LMLoss(decoder)(batch_of(ids))
    assert len(weight_shapes) == 4 * config.n_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_are_a_function_of_seed_and_name(family: str) -> None:
    config = small_config(family, n_layers=8)
    one, same, other = (build(config, vocab_size=V, seed=s) for s in (1, 1, 2))
    for (name, a), (_, b), (_, c) in zip(
        *(d.named_parameters() for d in (one, same, other)), strict=True
    ):
        assert torch.equal(a, b)
        writes_to_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        if a.ndim == 1:
            assert bool((a == (0.0 if name.endswith("bias") else 1.0)).all())
            continue
        if name.startswith("ngrams.") or (writes_to_residual and family == "fast"):
            assert not a.any()
            continue
        assert not torch.equal(a, c)
        expected = 0.02
        if family == "transformer":
            # A uniform number in [-b, b] has the variance b^2 / 3.
            expected = 32**-0.5 if "embedding" in name else math.sqrt(2 / sum(a.shape))
        elif family == "gpt2" and writes_to_residual:
            expected /= math.sqrt(2 * 8)
        assert float(a.detach().std()) == pytest.approx(expected, rel=0.15)
        if family == "transformer" and "embedding" not in name:
            assert float(a.detach().abs().max()) <= math.sqrt(6 / sum(a.shape))
        part = initial_rows(config, name, a.shape, rows=(1, 3), seed=1, device=a.device)
        assert torch.equal(part, a.detach()[1:3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_module_of_a_block_has_a_tensor_split(variant: str) -> None:
    """Or a clear error, where a family has a module that cannot be split."""
    block = random_variant(variant).blocks["0"]
    modules = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
    if not modules <= _STYLES.keys():
        with pytest.raises(ValueError, match=r"parallel\.tensor must be 1"):
            block_plan(block)
        return
    plan = block_plan(block)
    by_input = {name for name, style in plan.items() if isinstance(style, RowwiseParallel)}
    assert by_input == {"attention.output", "feed_forward.down"}


def test_a_module_that_cannot_be_split_is_rejected_by_name() -> None:
    block = random_variant("llama").blocks["0"]
    block.attention.query_norm = nn.RMSNorm(8)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"parallel\.tensor must be 1: .* attention\.query_norm"):
        block_plan(block)
