# SPDX-License-Identifier: Apache-2.0
"""Intervals of means, shares and differences: pure functions of NumPy arrays.

Utterances of one sentence are not independent, so intervals of means resample whole sentences (cluster bootstrap), and
two systems that spoke the same utterances are compared pair by pair, which removes what the sentences have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
_CHUNK_NUMBERS = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A number and its confidence interval.

    Args:
        value: the estimate.
        low: lower end.
        high: upper end.
        n: how many utterances it rests on.
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference(Interval):
    """Mean of second minus first over the same utterances.

    Args:
        p_value: two-sided, of no difference: twice the share of resamples on the far side of 0, at most 1.
    """

    p_value: float


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> Interval:
    """Wilson's interval of a share; without observations it is [0, 1] around NaN.

    Example:
        >>> interval = wilson(9, 10)
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.596, 0.982)
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes} and {n}")
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), n)


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[str], resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval of a mean, resampling whole clusters.

    Args:
        values: one number per utterance, shape (utterances,).
        clusters: of each utterance, usually its sentence.
        resamples: how many.
        seed: of the resampling.
        level: of confidence.
    """
    array = np.asarray(values, np.float64)
    if array.size == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    low, high = _ends(_resampled_ratios(array, np.ones_like(array), clusters, resamples, seed), level)
    return Interval(float(array.mean()), low, high, array.size)


def cluster_rate(
    errors: ArrayLike,
    lengths: ArrayLike,
    clusters: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a corpus rate, all errors over all lengths, resampling whole clusters.

    Args:
        errors: of each utterance, shape (utterances,).
        lengths: of each utterance's reference, shape (utterances,).
        clusters: of each utterance, usually its sentence.
        resamples: how many.
        seed: of the resampling.
        level: of confidence.
    """
    counts, sizes = np.asarray(errors, np.float64), np.asarray(lengths, np.float64)
    _check_same(counts, sizes, "an error count and a length")
    if sizes.sum() == 0:
        return Interval(math.nan, math.nan, math.nan, counts.size)
    low, high = _ends(_resampled_ratios(counts, sizes, clusters, resamples, seed), level)
    return Interval(float(counts.sum() / sizes.sum()), low, high, counts.size)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Mean difference of two systems on the same utterances, with interval and p-value by cluster bootstrap.

    Args:
        first: one number per utterance of the first system, shape (utterances,).
        second: of the second system, the same utterances in the same order.
        clusters: of each utterance, usually its sentence.
        resamples: how many.
        seed: of the resampling.
        level: of confidence.
    """
    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if one.shape != two.shape:
        raise ValueError(f"expected the same utterances of both systems, got {one.size} and {two.size}")
    if one.size == 0:
        return Difference(math.nan, math.nan, math.nan, 0, math.nan)
    means = _resampled_ratios(two - one, np.ones_like(one), clusters, resamples, seed)
    return _difference(float((two - one).mean()), means, one.size, level)


def paired_rate_difference(
    first: ArrayLike,
    second: ArrayLike,
    lengths: ArrayLike,
    clusters: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Difference of two systems' corpus rates on the same references (Bisani and Ney 2004), by cluster bootstrap.

    Args:
        first: errors of the first system in each utterance, shape (utterances,).
        second: errors of the second system, the same utterances in the same order.
        lengths: of each utterance's reference, shape (utterances,).
        clusters: of each utterance, usually its sentence or its speaker.
        resamples: how many.
        seed: of the resampling.
        level: of confidence.
    """
    one, two, sizes = (np.asarray(values, np.float64) for values in (first, second, lengths))
    _check_same(one, two, "errors of both systems")
    _check_same(one, sizes, "an error count and a length")
    if sizes.sum() == 0:
        return Difference(math.nan, math.nan, math.nan, one.size, math.nan)
    rates = _resampled_ratios(two - one, sizes, clusters, resamples, seed)
    return _difference(float((two - one).sum() / sizes.sum()), rates, one.size, level)


def two_way_bootstrap(
    values: ArrayLike,
    listeners: Sequence[str],
    items: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Interval of a mean rating, resampling listeners and items at a time, and a p-value of a mean of 0.

    Ratings of one listener are not independent, and neither are those of one item. The mean may be that of differences
    (CMOS, or A minus B), for which the p-value is meant. Resamples without a single rating are left out.

    Args:
        values: one number per rating, shape (ratings,).
        listeners: who gave each rating.
        items: what each rating is of.
        resamples: how many.
        seed: of the resampling.
        level: of confidence.

    Raises:
        ValueError: a rating lacks its listener or item.
    """
    array = np.asarray(values, np.float64)
    if not len(listeners) == len(items) == array.size:
        raise ValueError(
            f"expected a listener and an item for each of the {array.size} ratings, got {len(listeners)} and "
            f"{len(items)}"
        )
    if array.size == 0:
        return Difference(math.nan, math.nan, math.nan, 0, math.nan)
    people, person = np.unique(np.asarray(listeners), return_inverse=True)
    things, thing = np.unique(np.asarray(items), return_inverse=True)
    shape = (len(people), len(things))
    cell = person * shape[1] + thing
    sums = np.bincount(cell, weights=array, minlength=shape[0] * shape[1]).reshape(shape)
    counts = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
    means = np.empty(resamples)
    rows = max(1, _CHUNK_NUMBERS // max(shape))
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        of_people = _multiplicities(shape[0], size, seed, start)
        of_things = _multiplicities(shape[1], size, seed + 1, start)
        # Each rating counts as often as its listener and its item together :: (k, l) (l, i) (k, i) -> (k,)
        total, number = (((of_people @ table) * of_things).sum(-1) for table in (sums, counts))
        means[start : start + size] = np.divide(total, number, out=np.full(size, math.nan), where=number > 0)
    return _difference(float(array.mean()), means[np.isfinite(means)], array.size, level)


def _difference(value: float, means: NDArray[np.float64], n: int, level: float) -> Difference:
    # One is added so that a p-value is never 0: it cannot be smaller than what the resamples can show.
    tail = min(int((means <= 0).sum()), int((means >= 0).sum())) + 1
    return Difference(value, *_ends(means, level), n, min(1.0, 2 * tail / (len(means) + 1)))


def _ends(means: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_same(one: NDArray[np.float64], other: NDArray[np.float64], what: str) -> None:
    if one.shape != other.shape:
        raise ValueError(f"expected {what} for each utterance, got {one.size} and {other.size}")


def _resampled_ratios(
    numerators: NDArray[np.float64],
    denominators: NDArray[np.float64],
    clusters: Sequence[str],
    resamples: int,
    seed: int,
) -> NDArray[np.float64]:
    """Sum of numerators over sum of denominators in each resample of clusters, shape (resamples,)."""
    if len(clusters) != numerators.size:
        raise ValueError(f"expected a cluster for each of the {numerators.size} utterances, got {len(clusters)}")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    totals = np.stack([np.bincount(index, weights=values) for values in (numerators, denominators)], -1)
    rows = max(1, _CHUNK_NUMBERS // len(names))
    chunks = [
        _multiplicities(len(names), min(rows, resamples - start), seed, start) @ totals
        for start in range(0, resamples, rows)
    ]
    sums = np.concatenate(chunks)
    kept = sums[sums[:, 1] > 0]  # a resample of nothing but empty references has no rate
    return kept[:, 0] / kept[:, 1]


@lru_cache(maxsize=4)
def _multiplicities(clusters: int, resamples: int, seed: int, start: int) -> NDArray[np.float64]:
    """How often each cluster is in each resample, (resamples, clusters); kept, because every metric uses the same."""
    drawn = np.random.default_rng([seed, start]).integers(0, clusters, size=(resamples, clusters))
    flat = drawn + clusters * np.arange(resamples)[:, None]
    return np.bincount(flat.ravel(), minlength=resamples * clusters).reshape(resamples, clusters).astype(np.float64)
