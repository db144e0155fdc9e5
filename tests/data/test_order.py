"""The order of the data: an invertible permutation, windows that tile the text, pure functions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import Order, Rollback, batch_of_step, step_of_batch
from pretrain.rng import FeistelPermutation


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_one_to_one_and_has_an_inverse(size: int, seed: int) -> None:
    index = np.arange(size, dtype=np.int64)
    permutation = FeistelPermutation(size, seed, "test")
    image = permutation.forward(index)
    assert np.array_equal(np.sort(image), index)
    assert np.array_equal(permutation.inverse(image), index)


def test_a_permutation_shuffles_and_depends_on_seed_and_purpose() -> None:
    index = np.arange(10_000, dtype=np.int64)
    image = FeistelPermutation(10_000, 1, "a").forward(index)
    # A random permutation has rank correlation 0 +- 0.01 and one fixed point on average.
    assert abs(np.corrcoef(index, image)[0, 1]) < 0.05
    assert (index == image).sum() < 10
    for other in (FeistelPermutation(10_000, 2, "a"), FeistelPermutation(10_000, 1, "b")):
        assert (other.forward(index) == image).mean() < 0.01


def test_a_permutation_of_a_huge_range_needs_no_memory() -> None:
    size = 3 * 10**14
    index = np.array([0, 1, size - 1], dtype=np.int64)
    permutation = FeistelPermutation(size, 7, "huge")
    assert np.array_equal(permutation.inverse(permutation.forward(index)), index)


@given(n_tokens=st.integers(40, 900), context=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_an_epoch_uses_each_token_once_as_input_and_stays_inside(
    n_tokens: int, context: int, seed: int
) -> None:
    order = Order(n_tokens, context, seed)
    for epoch in range(3):
        samples = np.arange(order.n_windows, dtype=np.int64) + epoch * order.n_windows
        starts = order.window_starts(samples)
        assert starts.min() >= 0
        assert starts.max() + context + 1 <= n_tokens
        inputs = (starts[:, None] + np.arange(context)).ravel()
        assert len(np.unique(inputs)) == len(inputs)
        # At most the tokens of two windows are left out of an epoch.
        assert n_tokens - len(inputs) <= 2 * context


def test_epochs_differ_in_offset_and_order_but_are_reproducible() -> None:
    order = Order(10_000, 16, seed=3)
    first = order.window_starts(np.arange(order.n_windows, dtype=np.int64))
    second = order.window_starts(np.arange(order.n_windows, 2 * order.n_windows, dtype=np.int64))
    # Not only the offset: the windows themselves come in another order.
    windows = [(starts - order.epoch_offset(e)) // 16 for e, starts in enumerate((first, second))]
    assert (windows[0] == windows[1]).mean() < 0.05
    assert {order.epoch_offset(e) for e in range(40)} != {order.epoch_offset(0)}
    again = Order(10_000, 16, seed=3).window_starts(np.arange(order.n_windows, dtype=np.int64))
    assert np.array_equal(first, again)


def test_any_slice_of_samples_can_be_computed_by_itself() -> None:
    order = Order(5_000, 8, seed=1)
    samples = np.arange(100, 1500, dtype=np.int64)
    whole = order.window_starts(samples)
    pieces = [order.window_starts(samples[i : i + 37]) for i in range(0, len(samples), 37)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_windows_containing_inverts_window_starts() -> None:
    order = Order(1_000, 8, seed=5)
    samples = np.arange(3 * order.n_windows, dtype=np.int64)
    starts = order.window_starts(samples).tolist()
    for token in range(0, 1_000, 7):
        expected = {
            (sample, start)
            for sample, start in enumerate(starts)
            if start <= token <= start + order.context_length
        }
        windows = list(order.windows_containing(token, token + 1, len(samples)))
        assert set(windows) == expected, f"token {token}"
        assert len(windows) == len(expected)


def test_step_of_batch_inverts_batch_of_step() -> None:
    rollbacks = [Rollback(40, 6), Rollback(40, 3), Rollback(20, 5), Rollback(50, 1)]
    batches = [batch_of_step(step, rollbacks) for step in range(60)]
    assert batches[:20] == list(range(20))
    assert [batches[step] for step in (20, 39, 40, 49, 50)] == [25, 44, 54, 63, 65]
    for batch in range(batches[-1] + 1):
        step = batches.index(batch) if batch in batches else None
        assert step_of_batch(batch, rollbacks) == step, f"batch {batch}"


def test_a_context_that_does_not_fit_is_rejected_with_the_longest_that_does() -> None:
    with pytest.raises(ValueError, match=r"context of 51 .* 100 ids; the longest that fits is 50"):
        Order(100, 51, seed=0)
    assert Order(100, 50, seed=0).n_windows == 1
