# SPDX-License-Identifier: Apache-2.0
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_align.evaluation.metrics.functional import (
    cer,
    character_errors,
    cluster_bootstrap,
    nearest_cer,
    normalise,
    paired_difference,
    wilson,
)

words = st.text(alphabet="かきくけー", max_size=8)


def slow_edits(one, other):
    """Levenshtein's recursion as it is written in books."""
    table = [[i + j for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i, j in itertools.product(range(1, len(one) + 1), range(1, len(other) + 1)):
        change = table[i - 1][j - 1] + (one[i - 1] != other[j - 1])
        table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, change)
    return table[-1][-1]


@settings(max_examples=60, deadline=None)
@given(words, words)
def test_errors_are_the_fewest_edits(reference, hypothesis):
    assert character_errors(reference, hypothesis) == (slow_edits(reference, hypothesis), len(reference))


@settings(max_examples=30, deadline=None)
@given(words, words)
def test_a_text_has_no_errors_against_itself_and_edits_are_symmetric(one, other):
    assert character_errors(one, one)[0] == 0
    assert character_errors(one, other)[0] == character_errors(other, one)[0]


def test_width_punctuation_spaces_and_case_do_not_count():
    assert normalise("ＡＢＣ、 ﾅﾍﾞ。「は」！\n") == "abcナベは"
    assert cer("なべ は、からい。", "なべはからい") == 0


def test_long_marks_count():
    assert cer("かれー", "かれ") == pytest.approx(1 / 3)


def test_rate_may_exceed_one_and_an_empty_reference_counts_insertions():
    assert cer("か", "かかか") == 2
    assert cer("", "か") == 1


def test_nearest_takes_the_best_and_needs_one():
    assert nearest_cer(["からい", "つらい"], "つらい") == 0
    with pytest.raises(ValueError, match="at least one transcript"):
        nearest_cer([], "つらい")


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
