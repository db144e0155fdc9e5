"""Standard errors of a metric, and whether two models differ: resampling, drawn by a seed.

Input are per-example statistics (`metrics`), for two models those of the same examples. Standard
errors and intervals come from the bootstrap ("Bootstrap Methods", Efron, 1979), over examples and
paired between models as in "Statistical Significance Tests for Machine Translation Evaluation"
(Koehn, 2004). p-values come from the paired permutation test, which exchanges the two models'
answers to an example ("More accurate tests for the statistical significance of result differences",
Yeh, 2000). One example cannot be resampled and has no error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from pretrain.evaluate.metrics import Array, value

RESAMPLES = 2000
LEVEL = 0.05
POWER = 0.8
_SHARES = ("accuracy", "f1", "exact_match", "final_answer", "rouge")  # from 0 to 1
# Weights of resamples that exist at once.
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric of one model."""

    value: float
    stderr: float | None = None
    detectable: float | None = None
    """The smallest difference between two models with this error that an unpaired test detects with
    80 % power at the 5 % level; a paired one detects smaller ones. None where no possible
    difference is large enough, or where all examples gave the same, so that their spread is not
    known."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of one model minus that of another, on the same examples."""

    difference: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    """The 95 % interval."""
    p: float | None = None
    """The share of random exchanges of answers that give a difference at least as large."""
    detectable: float | None = None
    """The smallest true difference that these pairs detect with 80 % power at the 5 % level."""


def estimate(metric: str, statistics: Array, *, seed: int) -> Estimate:
    """The metric of statistics (examples, k), and its standard error."""
    total = float(value(metric, statistics.sum(0)))
    if len(statistics) < 2:
        return Estimate(total)
    stderr = _finite_std(value(metric, _resampled_sums(statistics, seed)))
    detectable = _detectable(metric, math.sqrt(2) * stderr) if stderr else None
    return Estimate(total, stderr, detectable)


def compare(metric: str, first: Array, second: Array, *, seed: int) -> Difference:
    """The first model's metric minus the second's. ValueError if the number of examples differs."""
    if first.shape != second.shape:
        raise ValueError(
            f"both models must have the same examples (got {len(first)} and {len(second)})"
        )
    difference = float(value(metric, first.sum(0)) - value(metric, second.sum(0)))
    if len(first) < 2:
        return Difference(difference)
    sums = np.split(_resampled_sums(np.concatenate([first, second], axis=1), seed), 2, axis=1)
    resampled = value(metric, sums[0]) - value(metric, sums[1])
    stderr = _finite_std(resampled)
    if stderr is None:
        return Difference(difference)
    low, high = np.quantile(resampled, [LEVEL / 2, 1 - LEVEL / 2])
    # Rounding must not make an equal difference a smaller one.
    as_large = abs(difference) * (1 - 1e-9) - 1e-15
    rng = np.random.default_rng(seed)
    n_as_large = 0
    for rows in _chunks(len(first)):
        # The models' answers to about half of the examples are exchanged.
        moved = rng.integers(0, 2, size=(rows, len(first)), dtype=np.int8) @ (second - first)
        exchanged = value(metric, first.sum(0) + moved) - value(metric, second.sum(0) - moved)
        n_as_large += int((np.abs(exchanged) >= as_large).sum())
    p = (1 + n_as_large) / (1 + RESAMPLES)
    detectable = _detectable(metric, stderr) if stderr else None
    return Difference(difference, stderr, float(low), float(high), p, detectable)


def _detectable(metric: str, stderr: float) -> float | None:
    """The true difference that is detected with probability POWER: the z of a two-sided test plus
    that of its power, times the error ("With Little Power Comes Great Responsibility", Card et al.,
    2020). None for a difference that the metric cannot have."""
    normal = NormalDist()
    difference = (normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)) * stderr
    largest = 1.0 if metric.startswith(_SHARES) else math.inf
    return difference if difference <= largest else None


def _finite_std(values: Array) -> float | None:
    std = float(values.std(ddof=1))
    return std if np.isfinite(std) else None


def _resampled_sums(statistics: Array, seed: int) -> Array:
    """Sums (RESAMPLES, k) over resamples of the examples, drawn with replacement."""
    n = len(statistics)
    rng = np.random.default_rng(seed)
    probabilities = np.full(n, 1 / n)
    chunks = [rng.multinomial(n, probabilities, size=rows) @ statistics for rows in _chunks(n)]
    return np.concatenate(chunks)


def _chunks(n_examples: int) -> Iterator[int]:
    """Numbers of resamples, RESAMPLES in total, whose weights fit the memory together."""
    n_rows = max(1, _CHUNK_WEIGHTS // n_examples)
    return (min(n_rows, RESAMPLES - first) for first in range(0, RESAMPLES, n_rows))
