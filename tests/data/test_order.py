"""The order of the data: a bijection that can be inverted, windows that tile the stream, pure
functions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import Order
from pretrain.rng import FeistelPermutation


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_a_bijection_is_one_to_one_and_its_inverse_undoes_it(size: int, seed: int) -> None:
    index = np.arange(size, dtype=np.int64)
    bijection = FeistelPermutation(size, seed, "test")
    image = bijection.forward(index)
    assert np.array_equal(np.sort(image), index)
    assert np.array_equal(bijection.inverse(image), index)


def test_a_bijection_mixes_and_hangs_on_seed_and_purpose() -> None:
    index = np.arange(10_000, dtype=np.int64)
    image = FeistelPermutation(10_000, 1, "a").forward(index)
    # A random permutation has rank correlation 0 +- 0.01 and one fixed point on average.
    assert abs(np.corrcoef(index, image)[0, 1]) < 0.05
    assert (index == image).sum() < 10
    for other in (FeistelPermutation(10_000, 2, "a"), FeistelPermutation(10_000, 1, "b")):
        assert (other.forward(index) == image).mean() < 0.01


def test_a_bijection_of_a_huge_range_needs_no_memory() -> None:
    size = 3 * 10**14
    index = np.array([0, 1, size - 1], dtype=np.int64)
    bijection = FeistelPermutation(size, 7, "huge")
    assert np.array_equal(bijection.inverse(bijection.forward(index)), index)


@given(n_tokens=st.integers(40, 900), context=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_an_epoch_uses_each_token_once_as_input_and_stays_inside(
    n_tokens: int, context: int, seed: int
) -> None:
    order = Order(n_tokens, context, seed)
    for epoch in range(3):
        samples = np.arange(order.n_windows, dtype=np.int64) + epoch * order.n_windows
        starts = order.starts(samples)
        assert starts.min() >= 0
        assert starts.max() + context + 1 <= n_tokens
        inputs = (starts[:, None] + np.arange(context)).ravel()
        assert len(np.unique(inputs)) == len(inputs)
        # At most two windows' worth of tokens sit an epoch out.
        assert n_tokens - len(inputs) <= 2 * context


def test_epochs_are_cut_and_ordered_anew_and_the_same_every_time() -> None:
    order = Order(10_000, 16, seed=3)
    first = order.starts(np.arange(order.n_windows, dtype=np.int64))
    second = order.starts(np.arange(order.n_windows, 2 * order.n_windows, dtype=np.int64))
    # Not only shifted: the windows themselves come in another order.
    windows = [(starts - order.shift(e)) // 16 for e, starts in enumerate((first, second))]
    assert (windows[0] == windows[1]).mean() < 0.05
    assert {order.shift(e) for e in range(40)} != {order.shift(0)}
    again = Order(10_000, 16, seed=3).starts(np.arange(order.n_windows, dtype=np.int64))
    assert np.array_equal(first, again)


def test_any_slice_of_samples_may_be_asked_for_by_itself() -> None:
    order = Order(5_000, 8, seed=1)
    samples = np.arange(100, 1500, dtype=np.int64)
    whole = order.starts(samples)
    pieces = [order.starts(samples[i : i + 37]) for i in range(0, len(samples), 37)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_sample_of_finds_the_step_that_saw_a_token() -> None:
    order = Order(1_000, 8, seed=5)
    found = 0
    for token in range(0, 1_000, 7):
        sample = order.sample_of(token, epoch=2)
        if sample is None:
            continue
        found += 1
        start = order.starts(np.array([sample], dtype=np.int64))[0]
        assert start <= token < start + 8
        assert sample // order.n_windows == 2
    assert found > 130


def test_a_context_that_does_not_fit_is_refused_with_the_longest_that_does() -> None:
    with pytest.raises(ValueError, match=r"context of 51 .* 100 ids; the longest that fits is 50"):
        Order(100, 51, seed=0)
    assert Order(100, 50, seed=0).n_windows == 1
