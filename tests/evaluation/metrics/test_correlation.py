# SPDX-License-Identifier: Apache-2.0
import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_align.evaluation.metrics.correlation import pearson, spearman

pairs = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=12)


def slow_pearson(one, two):
    """Covariance over the root of the variances, as in books."""
    a, b = sum(one) / len(one), sum(two) / len(two)
    covariance = sum((x - a) * (y - b) for x, y in zip(one, two, strict=True))
    return covariance / math.sqrt(sum((x - a) ** 2 for x in one) * sum((y - b) ** 2 for y in two))


def slow_ranks(values):
    """How many are smaller, and half of the others that are equal."""
    return [sum(y < x for y in values) + (sum(y == x for y in values) - 1) / 2 for x in values]


@settings(max_examples=100, deadline=None)
@given(pairs)
def test_both_are_the_formulas(rows):
    one, two = (list(side) for side in zip(*rows, strict=True))
    if len(set(one)) == 1 or len(set(two)) == 1:
        assert math.isnan(pearson(one, two))
        assert math.isnan(spearman(one, two))
        return
    assert pearson(one, two) == pytest.approx(slow_pearson(one, two), abs=1e-12)
    assert spearman(one, two) == pytest.approx(slow_pearson(slow_ranks(one), slow_ranks(two)), abs=1e-12)


def test_as_scipy_says():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    one, two = [1.0, 2.5, 2.5, 4.0, -3.0], [0.3, 0.1, 2.0, 2.0, -1.0]
    assert pearson(one, two) == pytest.approx(stats.pearsonr(one, two)[0])
    assert spearman(one, two) == pytest.approx(stats.spearmanr(one, two)[0])


def test_scale_and_offset_do_not_matter_nor_does_any_increasing_function_for_ranks():
    one, two = [0.1, 0.5, 0.2, 0.9], [1.0, 3.0, 2.5, 2.0]
    assert pearson([7 * x - 3 for x in one], two) == pytest.approx(pearson(one, two))
    assert pearson([-x for x in one], two) == pytest.approx(-pearson(one, two))
    assert spearman([math.exp(9 * x) for x in one], two) == pytest.approx(spearman(one, two))


def test_extreme_numbers_do_not_overflow():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pearson([1e300, -1e300, 5e299], [1e-300, -1e-300, 5e-301]) == pytest.approx(1.0)
        assert math.isnan(pearson([0.1] * 10, list(range(10))))
        assert math.isnan(pearson([0.0, 0.0], [1.0, 2.0]))


def test_few_numbers_and_mistakes():
    assert math.isnan(pearson([], []))
    assert math.isnan(spearman([1.0], [2.0]))
    with pytest.raises(ValueError, match=r"one prediction for each true score, got shapes \(2,\) and \(1,\)"):
        pearson([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="finite numbers"):
        spearman([1.0, math.nan], [1.0, 2.0])
