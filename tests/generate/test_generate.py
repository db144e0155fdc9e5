"""Sampling: the distribution, samples from it, and their independence of everything but seed and
place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from model_variants import VARIANTS, small_config
from pretrain.cli import main
from pretrain.generate.packing import pack_weights
from pretrain.generate.sampling import (
    Sampling,
    _invert_cdf,
    generate,
    generate_ids,
    next_distribution,
    sample,
    sampling_probabilities,
)
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import Decoder, build
from pretrain.model.layers import Block, KeyValueCache
from pretrain.rng import normal, uniform
from pretrain.runner.open import load_model

V = 40


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = ModelConfig(d_model=32, n_heads=4, n_kv_heads=2, context_length=16, n_layers=2)
    decoder = build(config, vocab_size=V, seed=2)
    with torch.no_grad():
        decoder.token_embedding.weight.mul_(20)  # far from uniform
        for p in decoder.blocks.parameters():
            p.mul_(3)
    return decoder


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.0]])


def test_packed_weights_keep_their_values(decoder: Decoder) -> None:
    other = build(decoder.config, vocab_size=V, seed=2)
    other.load_state_dict(decoder.state_dict())
    pack_weights(other)
    for one, packed in zip(decoder.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, packed)
    assert not other.head_weight.is_contiguous()
    assert not other.get_parameter("blocks.0.feed_forward.up.weight").is_contiguous()
    assert other.get_parameter("blocks.0.feed_forward.down.weight").is_contiguous()
    assert other.token_embedding.weight.is_contiguous()
    greedy = Sampling(temperature=0)
    expected = generate_ids(decoder, [1, 2], max_tokens=40, sampling=greedy)
    assert generate_ids(other, [1, 2], max_tokens=40, sampling=greedy) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_weights_give_the_same_logits_and_ids(variant: str) -> None:
    unpacked, packed = (
        build(small_config(**VARIANTS[variant]), vocab_size=V, seed=3) for _ in range(2)
    )
    with torch.no_grad():
        for name, p in unpacked.named_parameters():  # so that each one has an effect
            p.add_(normal(1, name, 0, p.numel(), device=p.device).view_as(p), alpha=0.3)
    packed.load_state_dict(unpacked.state_dict())
    pack_weights(packed)
    weights = packed.state_dict()
    assert list(weights) == list(unpacked.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in unpacked.state_dict().items())
    for block in packed.blocks.values():
        assert isinstance(block, Block)
        assert block.attention.packed is not None
        assert (block.feed_forward.packed is None) == (block.feed_forward.gate is None)
    logits = []
    for decoder in (unpacked, packed):
        cache, ids = KeyValueCache(), torch.tensor([[1, 2, 3, 4, 1, 2, 5], [7, 8, 9, 7, 8, 9, 7]])
        chunks = torch.split(ids, [3, 1, 2, 1], 1)
        with torch.inference_mode():
            parts = [decoder.forward(chunk, cache=cache) for chunk in chunks]
            logits.append(decoder.logits(torch.cat(parts, dim=1)))
    assert torch.allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5 * float(logits[0].std()))
    for sampling in (Sampling(temperature=0), Sampling(top_k=6), Sampling(top_p=0.9)):
        # Beyond the context too, and with several rows.
        found, expected = (
            generate_ids(decoder, [1, 2], max_tokens=30, n=3, sampling=sampling)
            for decoder in (packed, unpacked)
        )
        assert found == expected


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_weights_can_be_loaded_into_packed_ones(variant: str) -> None:
    """Packed matrices and biases share memory with those of the layers."""
    unpacked, packed = (
        build(small_config(**VARIANTS[variant]), vocab_size=V, seed=s) for s in (2, 9)
    )
    with torch.no_grad():
        for name, p in unpacked.named_parameters():  # biases too
            p.add_(normal(1, name, 0, p.numel(), device=p.device).view_as(p), alpha=0.3)
    pack_weights(packed)
    packed.load_state_dict(unpacked.state_dict())
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        logits = [decoder.logits(decoder.forward(ids)) for decoder in (unpacked, packed)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("top_p", [None, 0.7])
@pytest.mark.parametrize("top_k", [1, 5, V, V + 1])
def test_sampling_from_the_top_k_alone_equals_sampling_from_all(
    has_ties: bool, top_p: float | None, top_k: int
) -> None:
    rows = torch.arange(2000)
    logits = normal(1, "logits", 0, 2000 * V, device=rows.device).view(2000, V) * 2
    if has_ties:
        logits = logits.round()
    u = uniform(1, "draws", rows)
    for temperature in (0.0, 0.8):
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        ids = sample(logits, sampling, u)
        assert torch.equal(ids, _invert_cdf(sampling_probabilities(logits, sampling), u))


def test_nan_logits_still_give_a_valid_id() -> None:
    logits, u = torch.full((2, V), math.nan), torch.tensor([0.1, 0.9], dtype=torch.float64)
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(temperature=0)):
        assert bool((sample(logits, sampling, u) < V).all())


def test_each_position_has_its_own_random_number() -> None:
    """A model with a uniform distribution does not repeat one id."""
    config = ModelConfig(d_model=32, n_heads=2, context_length=64, n_layers=1)
    even = build(config, vocab_size=V, seed=1)
    torch.nn.init.zeros_(even.head_weight)
    ids = generate_ids(even, [1], max_tokens=200, sampling=Sampling(temperature=1.0))[0]
    assert len(set(ids)) > V / 2


def test_the_generate_command_packs_weights(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = []

    def open_and_record(*args: Any, **options: Any) -> Any:
        opened.append(load_model(*args, **options))
        return opened[0]

    monkeypatch.setattr("pretrain.cli.commands.generate.load_model", open_and_record)
    assert main(["generate", str(finished_run), "--max-tokens", "3"]) == 0
    assert not opened[0].decoder.head_weight.is_contiguous()


def test_temperature_top_k_and_top_p_equal_their_definitions() -> None:
    unpacked = LOGITS.double().softmax(-1)
    assert torch.allclose(sampling_probabilities(LOGITS, Sampling(temperature=1.0)), unpacked)
    cold = sampling_probabilities(LOGITS, Sampling(temperature=0.5))
    assert torch.allclose(cold, (2 * LOGITS.double()).softmax(-1))
    assert sampling_probabilities(LOGITS, Sampling(temperature=0.0)).tolist() == [[1, 0, 0, 0, 0]]
    top_1 = sampling_probabilities(LOGITS, Sampling(temperature=1.0, top_k=1))
    assert top_1.tolist() == [[1, 0, 0, 0, 0]]
    # Not 1e-308, which is 0 on a processor that flushes denormal numbers.
    tiny = sampling_probabilities(1e10 * LOGITS, Sampling(temperature=1e-300))
    assert tiny.tolist() == [[1, 0, 0, 0, 0]]
    equals = sampling_probabilities(torch.zeros(1, 5), Sampling(temperature=1.0, top_k=2))
    assert sorted(equals[0].tolist()) == [0, 0, 0, 0.5, 0.5]
    first, second = math.exp(2), math.exp(1)
    p = first / float(LOGITS.exp().sum())
    just_first = sampling_probabilities(LOGITS, Sampling(temperature=1.0, top_p=p - 1e-6))
    assert just_first.tolist() == [[1, 0, 0, 0, 0]]
    one_more = sampling_probabilities(LOGITS, Sampling(temperature=1.0, top_p=p + 1e-6))
    assert one_more[0].tolist() == pytest.approx(
        [first / (first + second), second / (first + second), 0, 0, 0]
    )


def test_sampled_frequencies_equal_the_probabilities(decoder: Decoder) -> None:
    sampling = Sampling(temperature=1.0, top_k=6, seed=4)
    drawn = generate_ids(decoder, [1, 2], max_tokens=1, n=4000, sampling=sampling)
    counts = torch.bincount(torch.tensor([row[0] for row in drawn]), minlength=V)
    logits = decoder.logits(decoder(torch.tensor([[1, 2]]))[:, -1])
    expected = 4000 * sampling_probabilities(logits, sampling)[0]
    assert bool((counts[expected == 0] == 0).all())
    chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert float(chi_square) < 25  # 5 degrees of freedom: once in ten thousand by chance


def test_a_completion_depends_on_its_number_and_not_on_n(decoder: Decoder) -> None:
    sampling = Sampling(seed=3)
    many = generate_ids(decoder, [1, 2, 3], max_tokens=12, n=5, sampling=sampling)
    few = generate_ids(decoder, [1, 2, 3], max_tokens=12, n=2, sampling=sampling)
    assert many[:2] == few
    assert len({tuple(row) for row in many}) > 1
    other = generate_ids(decoder, [1, 2, 3], max_tokens=12, n=2, sampling=Sampling(seed=4))
    assert other != few


def test_greedy_generation_with_and_without_cache_agrees(decoder: Decoder) -> None:
    ids = [5, 6]
    for _ in range(14):
        ids.append(int(decoder.logits(decoder(torch.tensor([ids]))[0, -1]).argmax()))
    greedy = Sampling(temperature=0.0)
    assert generate_ids(decoder, [5, 6], max_tokens=14, sampling=greedy) == [ids[2:]]


@pytest.mark.parametrize("length", [15, 16, 30])
def test_generation_continues_beyond_the_context(decoder: Decoder, length: int) -> None:
    """When the 16 positions are full, the last 8 ids are read again."""
    greedy = Sampling(temperature=0.0)
    found = generate_ids(decoder, list(range(length)), max_tokens=40, sampling=greedy)[0]
    assert len(found) == 40
    seen = list(range(length))
    window = seen[-16:]
    for _ in range(40):
        if len(window) > 16:
            window = seen[-8:]
        token = int(decoder.logits(decoder(torch.tensor([window]))[0, -1]).argmax())
        seen.append(token)
        window.append(token)
    assert found == seen[length:]


def test_a_completion_ends_before_a_stop_id(decoder: Decoder) -> None:
    free = generate_ids(decoder, [1], max_tokens=10, n=3, sampling=Sampling(seed=1))
    end = free[0][4]
    cut = generate_ids(decoder, [1], max_tokens=10, n=3, sampling=Sampling(seed=1), stop_ids=[end])
    for row, whole in zip(cut, free, strict=True):
        assert row == (whole[: whole.index(end)] if end in whole else whole)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_out_of_range_sampling_parameters_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_counts_below_one_and_empty_prompts_are_rejected(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="the prompt must have at least 1 token"):
        generate_ids(decoder, [], max_tokens=1, sampling=Sampling())
    with pytest.raises(ValueError, match="both must be at least 1"):
        generate_ids(decoder, [1], max_tokens=0, sampling=Sampling())


def test_text_in_text_out(finished_run: Path) -> None:
    model = load_model(str(finished_run), device="cpu")
    texts = generate(model.decoder, model.tokenizer, "The people", max_tokens=20, n=2)
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)
    probabilities = next_distribution(model.decoder, model.tokenizer, "The people")
    assert probabilities.shape == (model.tokenizer.vocab_size,)
    assert float(probabilities.sum()) == pytest.approx(1.0)
    # Of a prompt longer than the context the end is read.
    assert next_distribution(model.decoder, model.tokenizer, "The people " * 99).shape == (400,)
