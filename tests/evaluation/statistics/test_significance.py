# SPDX-License-Identifier: Apache-2.0
"""Our tests of hypotheses against scipy's and statsmodels'."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_align.evaluation.statistics.significance import binomial, holm, mcnemar, wilcoxon

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install -e '.[test]'")


@pytest.mark.parametrize("n", [1, 2, 7, 20, 133])
@pytest.mark.parametrize("share", [0.5, 0.2, 0.91])
def test_binomial_is_scipys(n, share):
    for k in range(n + 1):
        assert binomial(k, n, share) == pytest.approx(stats.binomtest(k, n, share).pvalue, rel=1e-9, abs=1e-13)


def test_binomial_at_the_ends():
    assert binomial(0, 0) == 1
    assert binomial(0, 5, 0.0) == binomial(5, 5, 1.0) == 1
    assert binomial(1, 5, 0.0) == 0
    assert binomial(3000, 6000) == pytest.approx(1)
    with pytest.raises(ValueError, match="successes <= n"):
        binomial(3, 2)


@pytest.mark.parametrize(("mended", "broken"), [(8, 0), (0, 3), (12, 5), (5, 5), (0, 0), (320, 96)])
def test_mcnemar_is_statsmodels(mended, broken):
    peer = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is not installed")
    before = [False] * mended + [True] * broken + [True, False, False]
    after = [True] * mended + [False] * broken + [True, False, False]
    found = mcnemar(before, after)
    assert (found.mended, found.broken) == (mended, broken)
    expected = peer.mcnemar([[2, broken], [mended, 1]], exact=True).pvalue if mended + broken else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_needs_the_same_utterances():
    with pytest.raises(ValueError, match="same utterances of both systems, got 2 and 1"):
        mcnemar([True, False], [True])


@pytest.mark.parametrize("n", [1, 4, 10, 25, 26, 60])
def test_signed_ranks_are_scipys_without_ties(n):
    generator = np.random.default_rng(n)
    differences = generator.normal(0.2, size=n)
    found = wilcoxon([*differences, 0.0, 0.0])
    exact = n <= 25
    assert (found.n, found.exact) == (n, exact)
    peer = stats.wilcoxon(differences, method="exact" if exact else "approx", correction=False)
    assert found.statistic == pytest.approx(peer.statistic)
    assert found.p_value == pytest.approx(peer.pvalue, rel=1e-9)


def test_signed_ranks_with_ties_are_scipys_beyond_the_exact():
    differences = np.random.default_rng(5).integers(-3, 5, size=80).astype(float)
    peer = stats.wilcoxon(differences, method="approx", correction=False)
    assert wilcoxon(differences).p_value == pytest.approx(peer.pvalue, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-4, 4), max_size=9))
def test_exact_signed_ranks_with_ties_are_those_of_all_signs(differences):
    """Every choice of signs, one after the other, is as likely."""
    values = [abs(one) for one in differences if one]
    ranks = stats.rankdata(values) if values else []
    sums = [sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in _signs(len(values))]
    total = sum(ranks)
    seen = sum(r for r, one in zip(ranks, [d for d in differences if d], strict=True) if one > 0)
    smaller = min(seen, total - seen)
    expected = sum(min(one, total - one) <= smaller + 1e-9 for one in sums) / len(sums)
    found = wilcoxon(differences)
    assert found.statistic == pytest.approx(smaller)
    assert found.p_value == pytest.approx(expected)


def _signs(n):
    return itertools.product((False, True), repeat=n)


def test_signed_ranks_without_a_difference():
    assert wilcoxon([0.0, 0.0]).p_value == wilcoxon([]).p_value == 1
    with pytest.raises(ValueError, match="finite"):
        wilcoxon([1.0, math.nan])


@pytest.mark.parametrize("p_values", [[0.3], [0.04, 0.01, 0.03], [0.2, 0.2, 0.0, 1.0], [0.9, 0.7, 0.6, 0.001, 0.02]])
def test_holm_is_statsmodels(p_values):
    peer = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    found = holm({number: value for number, value in enumerate(p_values)})
    assert list(found.values()) == pytest.approx(list(peer.multipletests(p_values, method="holm")[1]))


def test_holm_leaves_out_what_is_no_hypothesis():
    found = holm({"a": 0.02, "b": math.nan, "c": 0.04})
    assert (found["a"], found["c"]) == pytest.approx((0.04, 0.04))
    assert math.isnan(found["b"])
    assert holm({}) == {}
