# SPDX-License-Identifier: Apache-2.0
"""Error counts and intervals: pure functions of strings and NumPy arrays.

Utterances of one sentence are not independent, so intervals of means resample whole sentences (cluster bootstrap), and
two systems that spoke the same utterances are compared pair by pair, which removes what the sentences have in common.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from kaldialign import edit_distance
from numpy.typing import ArrayLike, NDArray

BAD_CER = 0.3
"""An utterance with a higher character error rate is a bad case."""
RESAMPLES = 10_000
_CHUNK_NUMBERS = 2_000_000


def normalise(text: str) -> str:
    """What characters are counted: NFKC, lower case, without punctuation, symbols and spaces.

    Example:
        >>> normalise("カレーは、とても ﾂﾗｲ！")
        'カレーはとてもツライ'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if unicodedata.category(character)[0] not in "PSZC")


def character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Fewest edits that turn the reference into the hypothesis, and the reference's length, in normalised characters.

    Example:
        >>> character_errors("なべわからい", "なべつらい、よ")
        (3, 6)
    """
    expected, heard = normalise(reference), normalise(hypothesis)
    return edits(expected, heard), len(expected)


def edits(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other.

    Example:
        >>> edits("からい", "つらいよ")
        2
    """
    counts: dict[str, Any] = edit_distance(list(reference), list(hypothesis))
    return int(counts["total"])


def cer(reference: str, hypothesis: str) -> float:
    """Character error rate of one utterance: edits over the reference's length; may exceed 1.

    Example:
        >>> cer("かな", "かに")
        0.5
    """
    errors, length = character_errors(reference, hypothesis)
    return errors / max(length, 1)


def error_rate(reference: Sequence[str], hypothesis: Sequence[str]) -> float:
    """Edits over the reference's length, in whatever both are sequences of: characters, words, phonemes.

    Example:
        >>> error_rate("R EH1 D".split(), "R IY1 D".split())
        0.3333333333333333
    """
    return edits(reference, hypothesis) / max(1, len(reference))


def nearest_cer(references: Sequence[str], hypothesis: str) -> float:
    """Character error rate against the nearest of several references."""
    if not references:
        raise ValueError("expected at least one transcript to compare with, got none")
    return min(cer(reference, hypothesis) for reference in references)


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
    means = _resampled_means(array, clusters, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high), array.size)


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
    means = _resampled_means(two - one, clusters, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # One is added so that a p-value is never 0: it cannot be smaller than what the resamples can show.
    tail = min(int((means <= 0).sum()), int((means >= 0).sum())) + 1
    p_value = min(1.0, 2 * tail / (resamples + 1))
    return Difference(float((two - one).mean()), float(low), float(high), one.size, p_value)


def _resampled_means(
    values: NDArray[np.float64], clusters: Sequence[str], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Mean of each resample, shape (resamples,): a ratio of sums over the clusters drawn."""
    if len(clusters) != values.size:
        raise ValueError(f"expected a cluster for each of the {values.size} utterances, got {len(clusters)}")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    totals = np.stack([np.bincount(index, weights=values), np.bincount(index).astype(np.float64)], -1)
    rows = max(1, _CHUNK_NUMBERS // len(names))
    chunks = [
        _multiplicities(len(names), min(rows, resamples - start), seed, start) @ totals
        for start in range(0, resamples, rows)
    ]
    sums = np.concatenate(chunks)
    return sums[:, 0] / sums[:, 1]


@lru_cache(maxsize=4)
def _multiplicities(clusters: int, resamples: int, seed: int, start: int) -> NDArray[np.float64]:
    """How often each cluster is in each resample, (resamples, clusters); kept, because every metric uses the same."""
    drawn = np.random.default_rng([seed, start]).integers(0, clusters, size=(resamples, clusters))
    flat = drawn + clusters * np.arange(resamples)[:, None]
    return np.bincount(flat.ravel(), minlength=resamples * clusters).reshape(resamples, clusters).astype(np.float64)
