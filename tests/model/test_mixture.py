"""A mixture of decoders: its probabilities are the weighted mean of theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model_variants import VARIANTS, T, V, batch_of, random_variant, small_config
from pretrain.data.batches import MicroBatch
from pretrain.generate.packing import pack_weights
from pretrain.generate.sampling import Sampling, generate_ids
from pretrain.model.decoder import Decoder, build
from pretrain.model.layers import KeyValueCache
from pretrain.model.loss import IGNORE_INDEX, LMLoss
from pretrain.model.mixture import Mixture

WEIGHTS = [3.0, 1.0, 2.0]


@pytest.fixture(scope="module")
def parts() -> list[Decoder]:
    """Decoders of three families and widths; the last one has a longer context."""
    config = small_config(**VARIANTS["llama"] | {"d_model": 64, "context_length": 2 * T})
    decoders = [
        random_variant("fast"),
        random_variant("gpt2"),
        build(config, vocab_size=V, seed=5),
    ]
    with torch.no_grad():
        for decoder in decoders:
            decoder.token_embedding.weight.mul_(20)  # far from uniform
    return [decoder.eval() for decoder in decoders]


@pytest.fixture(scope="module")
def ids_bt() -> Tensor:
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(3))


def mean_of(parts: list[Decoder], ids_bt: Tensor) -> Tensor:
    probabilities = [part.logits(part(ids_bt)).double().softmax(-1) for part in parts]
    pairs = zip(WEIGHTS, probabilities, strict=True)
    return torch.stack([weight / sum(WEIGHTS) * p for weight, p in pairs]).sum(0)


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [False, True])
def test_probabilities_are_the_mean_with_and_without_a_cache(
    parts: list[Decoder], ids_bt: Tensor, is_packed: bool
) -> None:
    expected = mean_of(parts, ids_bt)
    assert (expected.amax(-1) > 0.05).any()
    assert not torch.allclose(expected, parts[0].logits(parts[0](ids_bt)).double().softmax(-1))
    mixture = Mixture(parts, WEIGHTS)
    if is_packed:
        pack_weights(mixture)
    whole = mixture.logits(mixture(ids_bt)).double().exp()
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)

    cache, rows = KeyValueCache(), []
    for piece in torch.split(ids_bt, [5, *[1] * (T - 5)], dim=1):
        rows.append(mixture.logits(mixture(piece, cache=cache)).double().exp())
    assert cache.length == T
    torch.testing.assert_close(torch.cat(rows, 1), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_text_longer_than_the_shortest_context_is_generated(parts: list[Decoder]) -> None:
    mixture = Mixture(parts, WEIGHTS)
    assert mixture.config.window_tokens == T
    (ids,) = generate_ids(mixture, [1, 2], max_tokens=2 * T, sampling=Sampling(temperature=0))
    first = int(mean_of(parts, torch.tensor([[1, 2]]))[0, -1].argmax())
    assert (len(ids), ids[0]) == (2 * T, first)


@torch.no_grad()
def test_nats_are_those_of_the_mean(parts: list[Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.model.loss.MIN_CHUNK_ROWS", 5)  # 24 targets in 5 chunks
    ids = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(4))
    batch = batch_of(ids)
    targets = batch.targets.clone()
    targets[1, 7:] = IGNORE_INDEX
    nats, n_targets = LMLoss(Mixture(parts, WEIGHTS)).eval()(
        MicroBatch(batch.inputs, targets, batch.samples)
    )
    log_p = mean_of(parts, batch.inputs).log().gather(2, batch.targets[..., None])[..., 0]
    assert n_targets == T + 7
    assert float(nats) == pytest.approx(float(-log_p[targets >= 0].sum()), rel=1e-6)
