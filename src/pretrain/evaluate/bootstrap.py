"""How sure a number is, and whether two models differ: everything from resampling, by a seed.

Statistics an example come in (metrics.py), for two models those of the same examples. Standard
errors and intervals are of the bootstrap ("Bootstrap Methods", Efron, 1979), over examples and
paired between models as in "Statistical Significance Tests for Machine Translation Evaluation"
(Koehn, 2004); p-values are of the paired permutation test, which exchanges the models' answers to
an example ("More accurate tests for the statistical significance of result differences", Yeh,
2000). With one example there is nothing to resample, and no error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from pretrain.evaluate.metrics import Array, value

RESAMPLES = 2000
LEVEL, POWER = 0.05, 0.8
# Weights of resamples that exist at once.
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric of one model."""

    value: float
    stderr: float | None
    detectable: float | None
    """The smallest difference between two models of this error that the examples show with 80 %
    power at 5 % when they are not paired; pairs show smaller ones."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of one model minus that of another, on the same examples."""

    difference: float
    stderr: float | None
    low: float | None
    high: float | None
    """The 95 % interval."""
    p: float | None
    """How often exchanging answers by chance makes a difference as large."""
    detectable: float | None
    """The smallest true difference that these pairs show with 80 % power at 5 %."""


def estimate(metric: str, statistics: Array, *, seed: int) -> Estimate:
    """The metric of statistics (examples, k), and its error."""
    whole = float(value(metric, statistics.sum(0)))
    if len(statistics) < 2:
        return Estimate(whole, None, None)
    spread = _finite_std(value(metric, _resampled(statistics, seed)))
    # Where all examples gave the same, nothing is known of how they differ.
    detectable = _detectable(math.sqrt(2) * spread) if spread else None
    return Estimate(whole, spread, detectable)


def compare(metric: str, first: Array, second: Array, *, seed: int) -> Difference:
    """The first model's metric minus the second's. ValueError for other examples than one's own."""
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} examples; legal: the same for both")
    whole = _difference(metric, first.sum(0), second.sum(0))
    if len(first) < 2:
        return Difference(float(whole), None, None, None, None, None)
    width = first.shape[1]
    sums = _resampled(np.concatenate([first, second], axis=1), seed)
    drawn = _difference(metric, sums[:, :width], sums[:, width:])
    spread = _finite_std(drawn)
    if spread is None:
        return Difference(float(whole), None, None, None, None, None)
    detectable = _detectable(spread) if spread else None
    low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    exchanged = np.concatenate(list(_exchanged(metric, first, second, seed)))
    # A hair of rounding must not make an equal difference a smaller one.
    as_large = np.abs(exchanged) >= abs(float(whole)) * (1 - 1e-9) - 1e-15
    p = (1 + int(as_large.sum())) / (1 + len(exchanged))
    return Difference(float(whole), spread, float(low), float(high), p, detectable)


def _difference(metric: str, first: Array, second: Array) -> Array:
    found: Array = value(metric, first) - value(metric, second)
    return found


def _detectable(stderr: float) -> float:
    """The true difference that is found with the power: so many errors as the z of a two-sided test
    and that of its power make ("With Little Power Comes Great Responsibility", Card et al., 2020).
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)) * stderr


def _finite_std(values: Array) -> float | None:
    spread = float(values.std(ddof=1))
    return spread if np.isfinite(spread) else None


def _resampled(statistics: Array, seed: int) -> Array:
    """Sums (RESAMPLES, k) of as many examples as there are, drawn with replacement."""
    n, rng = len(statistics), np.random.default_rng(seed)
    even = np.full(n, 1 / n)
    parts = [rng.multinomial(n, even, size=rows) @ statistics for rows in _chunks(n)]
    return np.concatenate(parts)


def _exchanged(metric: str, first: Array, second: Array, seed: int) -> Iterator[Array]:
    """Differences after the models' answers to about half of the examples changed places."""
    rng = np.random.default_rng(seed)
    both, gap = first.sum(0), second - first
    other = second.sum(0)
    for rows in _chunks(len(first)):
        moved = rng.integers(0, 2, size=(rows, len(first)), dtype=np.int8) @ gap
        yield _difference(metric, both + moved, other - moved)


def _chunks(n: int) -> Iterator[int]:
    """Rows of weights at a time, RESAMPLES in all."""
    left = RESAMPLES
    while left:
        rows = min(left, max(1, _CHUNK_WEIGHTS // n))
        yield rows
        left -= rows
