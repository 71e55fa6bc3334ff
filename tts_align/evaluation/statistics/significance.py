# SPDX-License-Identifier: Apache-2.0
"""Tests of hypotheses, exact wherever that is possible: pure functions of counts and NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

EXACT_PAIRS = 25
"""The signed-rank test is exact up to this number of differences that are not 0."""
_AS_LIKELY = 1 + 1e-7
"""What is as likely as the observation, but for rounding, is as extreme."""
Name = TypeVar("Name")


@dataclass(frozen=True)
class SignedRank:
    """Wilcoxon's signed-rank test.

    Args:
        statistic: the smaller of the rank sums of positive and of negative differences.
        p_value: two-sided, of differences that are symmetric about 0.
        n: differences that are not 0.
        exact: whether the p-value is exact; otherwise from the normal distribution.
    """

    statistic: float
    p_value: float
    n: int
    exact: bool


@dataclass(frozen=True)
class McNemar:
    """What changed between two systems that are each right or wrong on the same utterances.

    Args:
        mended: wrong before, right after.
        broken: right before, wrong after.
        p_value: two-sided and exact, of mending being as likely as breaking.
    """

    mended: int
    broken: int
    p_value: float


def binomial(successes: int, n: int, share: float = 0.5) -> float:
    """Exact two-sided p-value of a share: the probability of everything that is no likelier than what was seen.

    Args:
        successes: how many.
        n: of how many.
        share: of the hypothesis.

    Example:
        >>> round(binomial(9, 10), 4)  # 2 * (1 + 10) / 2**10
        0.0215
    """
    if not 0 <= successes <= n or not 0 <= share <= 1:
        raise ValueError(f"expected 0 <= successes <= n and 0 <= share <= 1, got {successes}, {n} and {share}")
    if n == 0:
        return 1.0
    counts = np.arange(n + 1)
    with np.errstate(divide="ignore"):
        logs = _log_choose(n) + _times(counts, np.log(share)) + _times(n - counts, np.log1p(-share))
    likely = np.exp(logs)
    return min(1.0, float(likely[likely <= likely[successes] * _AS_LIKELY].sum()))


def _log_choose(n: int) -> NDArray[np.float64]:
    """Logarithm of n choose k for every k, shape (n + 1,)."""
    logs = np.array([math.lgamma(k + 1) for k in range(n + 1)])
    return logs[n] - logs - logs[::-1]


def _times(count: NDArray[np.int64], log: float) -> NDArray[np.float64]:
    """Logarithm of a power, of which the power 0 is 1 even of 0."""
    return np.where(count > 0, np.maximum(count, 1) * log, 0.0)


def mcnemar(before: ArrayLike, after: ArrayLike) -> McNemar:
    """Exact McNemar test of two systems on the same utterances.

    Args:
        before: whether the first system is right in each utterance, shape (utterances,).
        after: whether the second one is, the same utterances in the same order.

    Raises:
        ValueError: there are not as many of the one as of the other.

    Example:
        >>> found = mcnemar([False] * 8 + [True] * 5, [True] * 13)
        >>> found.mended, found.broken, round(found.p_value, 5)
        (8, 0, 0.00781)
    """
    one, two = np.asarray(before, bool), np.asarray(after, bool)
    if one.shape != two.shape:
        raise ValueError(f"expected the same utterances of both systems, got {one.size} and {two.size}")
    mended, broken = int((~one & two).sum()), int((one & ~two).sum())
    return McNemar(mended, broken, binomial(mended, mended + broken))


def wilcoxon(differences: ArrayLike) -> SignedRank:
    """Wilcoxon's signed-rank test of paired differences; differences of 0 are left out.

    Exact for 25 differences or fewer, with ties too; beyond that the normal distribution, with its variance corrected
    for ties and without a correction for continuity.

    Args:
        differences: one per pair, such as an item's mean in one system minus that in the other, shape (pairs,).
    """
    values = np.asarray(differences, np.float64)
    values = values[values != 0]
    if not np.isfinite(values).all():
        raise ValueError("expected finite differences")
    n = len(values)
    if n == 0:
        return SignedRank(0.0, 1.0, 0, True)
    ranks = _ranks(np.abs(values))
    positive = float(ranks[values > 0].sum())
    statistic = min(positive, float(ranks.sum()) - positive)
    if n <= EXACT_PAIRS:
        return SignedRank(statistic, _exact(ranks, statistic), n, True)
    # The variance of a sum of ranks with random signs; ties lower it through the ranks themselves.
    deviation = math.sqrt(float((ranks**2).sum()) / 4)
    z = (statistic - float(ranks.sum()) / 2) / deviation
    return SignedRank(statistic, min(1.0, math.erfc(-z / math.sqrt(2))), n, False)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; ties share the mean of theirs."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def _exact(ranks: NDArray[np.float64], statistic: float) -> float:
    """Share of all choices of signs whose smaller rank sum is no larger than the one seen."""
    doubled = np.rint(2 * ranks).astype(int)  # means of ties are halves
    ways = np.zeros(doubled.sum() + 1)
    ways[0] = 1
    for rank in doubled:
        ways[rank:] += ways[: len(ways) - rank].copy()
    below = ways[: round(2 * statistic) + 1].sum()
    return min(1.0, float(2 * below / ways.sum()))


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's adjusted p-values: below a level, those are significant with that error of the whole family.

    Args:
        p_values: of each hypothesis; those that are NaN are of no hypothesis and stay NaN.

    Example:
        >>> holm({"cer": 0.01, "similarity": 0.04, "length": 0.03})
        {'cer': 0.03, 'similarity': 0.06, 'length': 0.06}
    """
    known = sorted((value, place) for place, value in enumerate(p_values.values()) if not math.isnan(value))
    adjusted, highest = dict.fromkeys(range(len(p_values)), math.nan), 0.0
    for number, (value, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - number) * value))
        adjusted[place] = highest
    return dict(zip(p_values, adjusted.values(), strict=True))
