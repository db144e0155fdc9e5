"""Dropout masks: their distribution, and what they depend on."""

from __future__ import annotations

import pytest
import torch

from model_variants import VARIANTS, T, V, batch_of, random_variant, small_config
from pretrain.model.decoder import Decoder, build
from pretrain.model.dropout import DropoutRng
from pretrain.model.loss import LMLoss


@pytest.fixture(params=VARIANTS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """A small decoder of each variant in which every parameter has an effect."""
    return random_variant(request.param)


def test_dropout_depends_on_the_sample_and_not_on_the_micro_batch() -> None:
    decoder = build(small_config("gpt2", dropout=0.3), vocab_size=V, seed=1)
    lm_loss = LMLoss(decoder, seed=9).train()
    ids = torch.randint(0, V, (4, T + 1), generator=torch.Generator().manual_seed(4))
    together = float(lm_loss(batch_of(ids, 10))[0])
    apart = sum(float(lm_loss(batch_of(ids[i : i + 1], 10 + i))[0]) for i in range(4))
    assert together == pytest.approx(apart, rel=1e-6)
    assert together == float(lm_loss(batch_of(ids, 10))[0])
    assert together != pytest.approx(float(lm_loss(batch_of(ids, 11))[0]), rel=1e-6)
    evaluated = float(lm_loss.eval()(batch_of(ids, 10))[0])
    assert evaluated == float(lm_loss(batch_of(ids, 11))[0])


def test_a_dropout_mask_has_its_probability_and_scale() -> None:
    mask = DropoutRng(1, torch.arange(50)).mask((50, 8, 64), 0.25, layer=1, dropout_id=2)
    assert float((mask == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(mask.max()) == pytest.approx(1 / 0.75)
    other = DropoutRng(1, torch.arange(50)).mask((50, 8, 64), 0.25, layer=2, dropout_id=2)
    assert float((mask == other).float().mean()) == pytest.approx(0.625, abs=0.02)


def test_reference_attention_equals_torchs_at_dropout_0(decoder: Decoder) -> None:
    decoder.double()
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        decoder(ids, dropout_rng=DropoutRng(1, torch.arange(2))), decoder(ids), rtol=1e-6, atol=1e-7
    )
