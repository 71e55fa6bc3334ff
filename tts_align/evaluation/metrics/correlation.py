# SPDX-License-Identifier: Apache-2.0
"""Correlation of predicted with true scores: linear (LCC) and of ranks (SRCC)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pearson(predicted: ArrayLike, true: ArrayLike) -> float:
    """Linear correlation coefficient; NaN where either side is constant or has fewer than two numbers.

    Args:
        predicted: one number per utterance, shape (utterances,).
        true: of the same utterances in the same order.

    Example:
        >>> pearson([1, 2, 3], [2, 4, 6])
        1.0
    """
    one, two = _checked(predicted, true)
    return float(np.clip(_unit(one) @ _unit(two), -1.0, 1.0)) if one.size > 1 else math.nan


def spearman(predicted: ArrayLike, true: ArrayLike) -> float:
    """Rank correlation coefficient; equal numbers share the mean of their ranks. NaN as in :func:`pearson`.

    Args:
        predicted: one number per utterance, shape (utterances,).
        true: of the same utterances in the same order.

    Example:
        >>> spearman([1, 2, 3], [1, 10, 100])
        1.0
    """
    one, two = _checked(predicted, true)
    return pearson(_ranks(one), _ranks(two))


def _checked(predicted: ArrayLike, true: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    one, two = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if one.shape != two.shape or one.ndim != 1:
        raise ValueError(f"expected one prediction for each true score, got shapes {one.shape} and {two.shape}")
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise ValueError("expected finite numbers: leave out the utterances that have no score")
    return one, two


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred, of length 1; NaN where all are equal. Scaled first, so that large and small numbers do not overflow."""
    centred = values / (np.abs(values).max() or 1.0)
    centred = centred - centred.mean()
    largest = np.abs(centred).max()
    # The mean of equal numbers may be off by a rounding.
    if largest == 0 or (values == values[0]).all():
        return np.full_like(values, math.nan)
    centred = centred / largest
    return centred / np.linalg.norm(centred)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each number, from 1; equal numbers share the mean of the ranks they fill."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[index]
