"""`CountDecoder`: the counts of a text with the interface of a decoder."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from model_variants import V as V_DECODER
from model_variants import batch_of, random_variant, small_config
from pretrain.generate.sampling import Sampling, generate_ids
from pretrain.model import counts as counting
from pretrain.model.counts import (
    CountDecoder,
    check_counts,
    count_decoder,
    kneser_ney,
    longest_counted,
)
from pretrain.model.layers import KeyValueCache
from pretrain.model.mixture import Mixture, fit_weights, target_probabilities

V, T = 11, 40
CONFIG = small_config("llama", context_length=T)


def some_ids(n: int, seed: int, vocab_size: int = V) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Ids of which some follow others more often."""
    rng = np.random.default_rng(seed)
    steps = rng.choice([1, 2, 5], size=n, p=[0.6, 0.3, 0.1])
    return np.cumsum(steps).astype(np.int64) % vocab_size


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_kneser_ney(order: int) -> None:
    train, held_out = some_ids(500, 1), some_ids(T, 2)
    held_out[7] = 3  # what comes after it was hardly ever seen
    expected = kneser_ney(train, held_out, vocab_size=V, order=order)[-1]
    decoder = count_decoder(train, CONFIG, vocab_size=V, order=order)
    ids = torch.from_numpy(held_out)[None]
    log_p = decoder.logits(decoder(ids[:, :-1]))[0]
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(T - 1))
    found = log_p.gather(1, ids[0, 1:, None])[:, 0].exp().numpy()
    np.testing.assert_allclose(found, expected[1:], rtol=1e-5)


def test_a_text_shorter_than_the_order_is_counted() -> None:
    train = some_ids(3, 1)
    decoder = count_decoder(train, CONFIG, vocab_size=V, order=5)
    assert len(decoder.keys) == 3
    log_p = decoder.logits(decoder(torch.from_numpy(train)[None]))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1, 3))


def test_a_cache_changes_nothing() -> None:
    decoder = count_decoder(some_ids(500, 1), CONFIG, vocab_size=V, order=4)
    ids = torch.from_numpy(some_ids(20, 2))[None]
    expected = decoder.logits(decoder(ids))
    cache = KeyValueCache()
    pieces = [decoder(piece, cache=cache) for piece in torch.split(ids, [3, *[1] * 17], dim=1)]
    assert torch.equal(decoder.logits(torch.cat(pieces, 1)), expected)


def test_its_weights_are_all_that_it_knows() -> None:
    decoder = count_decoder(some_ids(500, 1), CONFIG, vocab_size=V, order=4)
    other = CountDecoder(CONFIG, vocab_size=V, sizes=[len(keys) for keys in decoder.keys])
    other.load_state_dict(decoder.state_dict())
    ids = torch.from_numpy(some_ids(20, 2))[None]
    assert torch.equal(other.logits(other(ids)), decoder.logits(decoder(ids)))


def test_the_fitted_weights_of_a_mixture_are_the_best_ones() -> None:
    network = random_variant("gpt2").eval()
    train = some_ids(3000, 1, V_DECODER)
    counts = count_decoder(train, network.config, vocab_size=V_DECODER, order=3)
    length = network.config.window_tokens
    ids = torch.from_numpy(some_ids(4 * (length + 1), 2, V_DECODER)).view(4, -1)
    batch = batch_of(ids)

    def nats(weights: list[float]) -> float:
        log_p = Mixture([network, counts], weights).logits(network_and_counts(batch.inputs))
        return -float(log_p.gather(2, batch.targets[..., None]).sum())

    def network_and_counts(inputs: torch.Tensor) -> torch.Tensor:
        return Mixture([network, counts], [1, 1]).forward(inputs)

    with torch.no_grad():
        columns = [target_probabilities(decoder, [batch]) for decoder in (network, counts)]
        fitted = fit_weights(torch.stack(columns, 1))
        assert sum(fitted) == pytest.approx(1)
        assert fitted[1] > 0.9  # the network is random
        for change in (-0.02, 0.02):
            other = [fitted[0] + change, fitted[1] - change]
            if min(other) > 0:
                assert nats(fitted) < nats(other)


def test_the_probability_of_one_token_is_that_of_the_whole_vocabulary() -> None:
    config = random_variant("gpt2").config
    counts = count_decoder(some_ids(500, 1, V_DECODER), config, vocab_size=V_DECODER, order=4)
    ids = torch.from_numpy(some_ids(300, 2, V_DECODER))
    hidden = counts(ids[None, :-1])[0]
    whole = counts.logits(hidden).exp().gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(counts.target_probabilities(hidden, ids[1:]), whole)


def test_text_is_generated_from_counts_and_a_network() -> None:
    network = random_variant("gpt2").eval()
    counts = count_decoder(
        some_ids(3000, 1, V_DECODER), network.config, vocab_size=V_DECODER, order=3
    )
    mixture = Mixture([network, counts], [1e-6, 1])
    length = 2 * network.config.window_tokens
    (ids,) = generate_ids(mixture, [1, 2], max_tokens=length, sampling=Sampling(temperature=0))
    assert [(b - a) % V_DECODER for a, b in zip([2, *ids], ids, strict=False)] == [1] * length


def test_what_is_rare_in_a_large_text_goes_to_shorter_n_grams() -> None:
    train = some_ids(500, 1)
    options: dict[str, int] = {"vocab_size": V, "order": 5}
    whole = count_decoder(train, CONFIG, **options, whole_tokens=500)
    pruned = count_decoder(train, CONFIG, **options, whole_tokens=499)
    sizes = [[len(keys) for keys in each.keys] for each in (whole, pruned)]
    assert sizes[0][:3] == sizes[1][:3]
    grams = [tuple(train[i : i + 5]) for i in range(len(train) - 4)]
    assert sizes[1][4] == sum(n > 1 for n in Counter(grams).values()) < sizes[0][4]

    ids = torch.from_numpy(some_ids(T, 2))[None]
    log_p, expected = (each.logits(each(ids)) for each in (pruned, whole))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1, T))
    # After five ids of which each longer n-gram is frequent, nothing has changed.
    [(frequent, _)] = Counter(grams).most_common(1)
    assert not torch.equal(log_p, expected)
    context = torch.tensor(frequent[:4])[None]
    last = [each.logits(each(context))[0, -1, frequent[4]] for each in (pruned, whole)]
    torch.testing.assert_close(*last)


def test_ids_of_a_full_dtype_are_counted() -> None:
    train = np.array([65_535, 7, 65_535, 7, 65_535], np.uint16)
    found = kneser_ney(train, train, vocab_size=65_536, order=3)
    expected = kneser_ney(train.astype(np.int64), train, vocab_size=65_536, order=3)
    np.testing.assert_array_equal(found, expected)
    assert found[-1][-1] > 0.5


def test_a_text_whose_long_n_grams_are_all_rare_is_counted() -> None:
    train = np.random.default_rng(0).integers(0, 256, 400)
    decoder = count_decoder(train, CONFIG, vocab_size=256, order=6, whole_tokens=10)
    assert len(decoder.keys) == 3
    log_p = decoder.logits(decoder(torch.from_numpy(train[:9])[None]))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1, 9))


def test_ngrams_longer_than_63_bits_are_rejected() -> None:
    sizes = {2: 16, 65: 10, 257: 7, 4096: 5, 6207: 5, 6208: 4, 50_257: 4, 128_256: 3}
    assert {size: longest_counted(size) for size in sizes} == sizes
    with pytest.raises(ValueError, match=r"--counts is 5; it must be at most 4: .* of 6,208 "):
        check_counts("--counts", 5, 6208)
    # A run of before may have been given more than can be counted.
    assert len(count_decoder(some_ids(50, 1), CONFIG, vocab_size=6208, order=5).keys) == 4


def test_counting_takes_a_third_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "memory_bytes", lambda: 3 * counting.BYTES_PER_TOKEN * 1000)
    assert [counting.n_counted(n) for n in (999, 1001, 10**12)] == [999, 1000, 1000]
    monkeypatch.setattr(counting, "memory_bytes", lambda: None)
    assert counting.n_counted(10**12) == counting.MAX_COUNTED_TOKENS
