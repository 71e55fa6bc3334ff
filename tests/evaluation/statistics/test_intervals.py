# SPDX-License-Identifier: Apache-2.0
import itertools
import math
import random

import numpy as np
import pytest

from tts_align.evaluation.statistics.intervals import (
    cluster_bootstrap,
    cluster_rate,
    paired_difference,
    paired_rate_difference,
    two_way_bootstrap,
    wilson,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (81, 263)])
def test_wilson_ends_solve_the_score_equation(k, n):
    """Both ends p satisfy (k/n - p)^2 = z^2 p (1 - p) / n."""
    interval = wilson(k, n)
    for p in (interval.low, interval.high):
        assert (k / n - p) ** 2 == pytest.approx(1.959963985**2 * p * (1 - p) / n, abs=1e-9)
    assert interval.value == k / n


def test_wilson_without_observations_knows_nothing():
    interval = wilson(0, 0)
    assert math.isnan(interval.value)
    assert (interval.low, interval.high, interval.n) == (0, 1, 0)
    with pytest.raises(ValueError, match="successes <= n"):
        wilson(3, 2)


def slow_bootstrap(values, clusters, resamples, seed):
    """Draw clusters with replacement, pool their values, average: one resample after the other."""
    generator, names = random.Random(seed), sorted(set(clusters))
    means = []
    for _ in range(resamples):
        pooled = []
        for name in generator.choices(names, k=len(names)):
            pooled += [value for value, cluster in zip(values, clusters, strict=True) if cluster == name]
        means.append(sum(pooled) / len(pooled))
    return np.quantile(means, [0.025, 0.975])


def test_bootstrap_agrees_with_a_slow_one_on_clusters_of_unequal_size():
    generator = np.random.default_rng(3)
    clusters = [f"s{i}" for i in range(40) for _ in range(1 + i % 4)]
    values = generator.normal(size=len(clusters)) + np.repeat(generator.normal(size=40), [1 + i % 4 for i in range(40)])
    interval = cluster_bootstrap(values, clusters, 10_000)
    low, high = slow_bootstrap(values.tolist(), clusters, 3000, 0)
    assert interval.low == pytest.approx(low, abs=0.05)
    assert interval.high == pytest.approx(high, abs=0.05)
    assert interval.value == pytest.approx(values.mean())
    assert interval.n == len(values)


def test_clusters_widen_the_interval():
    values = np.repeat([0.0, 1.0] * 20, 10)
    alone = cluster_bootstrap(values, [str(i) for i in range(400)])
    together = cluster_bootstrap(values, [str(i // 10) for i in range(400)])
    assert together.high - together.low > 2.5 * (alone.high - alone.low)


def test_bootstrap_is_seeded_and_many_clusters_go_through_in_chunks():
    values, clusters = np.arange(5000.0), [str(i) for i in range(5000)]
    one = cluster_bootstrap(values, clusters, 900)
    assert one == cluster_bootstrap(values, clusters, 900)
    assert one != cluster_bootstrap(values, clusters, 900, seed=1)
    standard_error = values.std() / math.sqrt(5000)
    assert one.high - one.low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)


def test_paired_difference_removes_what_the_sentences_share():
    generator = np.random.default_rng(0)
    hard = generator.normal(size=200)
    first, second = hard, hard + 0.1 + 0.1 * generator.normal(size=200)
    difference = paired_difference(first, second, [str(i) for i in range(200)])
    assert difference.value == pytest.approx((second - first).mean())
    assert 0.07 < difference.low < difference.value < difference.high < 0.13
    assert difference.p_value == pytest.approx(2 / 10_001)


def test_swapping_the_systems_turns_the_difference_round():
    generator = np.random.default_rng(1)
    first, second, clusters = generator.normal(size=50), generator.normal(size=50), [str(i // 2) for i in range(50)]
    there, back = paired_difference(first, second, clusters), paired_difference(second, first, clusters)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert there.p_value == back.p_value


def test_p_values_of_equal_systems_are_spread_evenly():
    """Of 200 pairs without a difference about 5 % come out below 0.05: 10 +- 9 at three standard deviations."""
    generator = np.random.default_rng(7)
    clusters = [str(i) for i in range(60)]
    small = sum(
        paired_difference(generator.normal(size=60), generator.normal(size=60), clusters, 1000).p_value < 0.05
        for _ in range(200)
    )
    assert 2 <= small <= 22


def test_no_difference_at_all_has_p_one():
    assert paired_difference([0.0, 1.0], [0.0, 1.0], ["a", "b"]).p_value == 1


def test_shapes_must_fit():
    with pytest.raises(ValueError, match="a cluster for each of the 3 utterances, got 2"):
        cluster_bootstrap([1.0, 2.0, 3.0], ["a", "b"])
    with pytest.raises(ValueError, match="same utterances of both systems, got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0], ["a", "b"])
    assert math.isnan(cluster_bootstrap([], []).value)
    assert math.isnan(paired_difference([], [], []).p_value)


# --- compared with peers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 7), (5, 7), (7, 7), (81, 263)])
def test_wilson_is_statsmodels(k, n):
    peer = pytest.importorskip("statsmodels.stats.proportion", reason="statsmodels is not installed")
    interval = wilson(k, n)
    assert (interval.low, interval.high) == pytest.approx(peer.proportion_confint(k, n, method="wilson"), abs=1e-12)


def test_bootstrap_over_single_utterances_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = np.random.default_rng(2).exponential(size=80)
    found = cluster_bootstrap(values, [str(i) for i in range(80)])
    peer = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", random_state=1)
    assert (found.low, found.high) == pytest.approx(tuple(peer.confidence_interval), abs=0.02)


def test_clustered_intervals_are_as_wide_as_statsmodels_clustered_errors():
    regression = pytest.importorskip("statsmodels.api", reason="statsmodels is not installed")
    generator = np.random.default_rng(4)
    groups = np.repeat(np.arange(80), 5)
    values = generator.normal(size=80)[groups] + generator.normal(size=400)
    fitted = regression.OLS(values, np.ones(400)).fit(cov_type="cluster", cov_kwds={"groups": groups})
    found = cluster_bootstrap(values, groups.astype(str).tolist())
    assert found.high - found.low == pytest.approx(2 * 1.96 * fitted.bse[0], rel=0.05)


def test_corpus_rates_are_ratios_of_sums_resampled_together():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    generator = np.random.default_rng(8)
    lengths = generator.integers(3, 30, size=90)
    first, second = generator.binomial(lengths, 0.3), generator.binomial(lengths, 0.2)
    names = [str(i) for i in range(90)]
    rate, difference = cluster_rate(first, lengths, names), paired_rate_difference(first, second, lengths, names)
    assert rate.value == pytest.approx(first.sum() / lengths.sum())
    assert difference.value == pytest.approx((second.sum() - first.sum()) / lengths.sum())

    def peer(numbers):
        ratio = stats.bootstrap(
            (numbers, lengths), lambda n, d, axis=-1: n.sum(axis) / d.sum(axis),
            paired=True, n_resamples=10_000, method="percentile", random_state=1,
        )  # fmt: skip
        return tuple(ratio.confidence_interval)

    assert (rate.low, rate.high) == pytest.approx(peer(first), abs=0.004)
    assert (difference.low, difference.high) == pytest.approx(peer(second - first), abs=0.004)
    assert difference.p_value < 0.01


def test_rates_of_empty_references():
    assert math.isnan(cluster_rate([0], [0], ["a"]).value)
    assert math.isnan(paired_rate_difference([0], [0], [0], ["a"]).p_value)
    assert cluster_rate([1, 0], [2, 0], ["a", "b"], 200).high == 0.5
    with pytest.raises(ValueError, match="an error count and a length for each utterance, got 2 and 1"):
        cluster_rate([1, 2], [3], ["a", "b"])


def test_two_way_bootstrap_is_the_slow_one():
    """Draw listeners and items with replacement; every rating counts as often as both were drawn together."""
    generator = random.Random(0)
    ratings = [
        (f"l{i}", f"i{j}", 3 + i % 3 - j % 2 + generator.random())
        for i in range(12)
        for j in range(15)
        if generator.random() < 0.7
    ]
    listeners, items, values = map(list, zip(*ratings, strict=True))
    table = {(person, thing): value for person, thing, value in ratings}
    people, things, means = sorted(set(listeners)), sorted(set(items)), []
    for _ in range(2500):
        drawn = generator.choices(people, k=len(people)), generator.choices(things, k=len(things))
        cells = [table[cell] for cell in itertools.product(*drawn) if cell in table]
        means.append(sum(cells) / len(cells))
    found = two_way_bootstrap(values, listeners, items)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.value == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.09)


def test_two_way_intervals_are_wider_than_either_ways_and_about_statsmodels():
    regression = pytest.importorskip("statsmodels.api", reason="statsmodels is not installed")
    generator = np.random.default_rng(6)
    person, thing = (axis.ravel() for axis in np.meshgrid(np.arange(40), np.arange(50), indexing="ij"))
    values = generator.normal(size=40)[person] + generator.normal(size=50)[thing] + generator.normal(size=2000)
    listeners, items = [[str(one) for one in axis] for axis in (person, thing)]
    found = two_way_bootstrap(values, listeners, items)
    width = found.high - found.low
    for clusters in (listeners, items):
        alone = cluster_bootstrap(values, clusters)
        assert width > alone.high - alone.low
    groups = np.stack([person, thing], -1)
    fitted = regression.OLS(values, np.ones(2000)).fit(cov_type="cluster", cov_kwds={"groups": groups})
    assert width == pytest.approx(2 * 1.96 * fitted.bse[0], rel=0.1)


def test_two_way_bootstrap_of_differences_has_a_p_value_and_survives_holes():
    found = two_way_bootstrap([1.0, 1.2, 0.8], ["a", "b", "c"], ["x", "y", "z"], 500)  # most resamples hit no rating
    assert found.low > 0
    assert found.p_value < 0.05
    assert math.isnan(two_way_bootstrap([], [], []).value)
    with pytest.raises(ValueError, match="a listener and an item for each of the 1 ratings, got 1 and 0"):
        two_way_bootstrap([1.0], ["a"], [])
