# SPDX-License-Identifier: Apache-2.0
"""Counts against jiwer, rates by hand."""

import jiwer
import kaldialign
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_align.evaluation.protocols import ErrorCounts, aggregate, count_errors

WORDS = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=9)


@settings(max_examples=80, deadline=None)
@given(WORDS.filter(bool), WORDS)
def test_totals_are_jiwers(reference, hypothesis):
    ours = count_errors(reference, hypothesis)
    theirs = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    assert ours.errors == theirs.substitutions + theirs.deletions + theirs.insertions
    assert ours.rate == pytest.approx(theirs.wer)
    assert ours.insertions - ours.deletions == len(hypothesis) - len(reference)
    kinds = (ours.substitutions, ours.deletions, ours.insertions)
    assert kinds == (theirs.substitutions, theirs.deletions, theirs.insertions)


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=12), st.text(max_size=12))
def test_characters_of_any_script_are_counted_as_by_kaldialign(reference, hypothesis):
    ours, theirs = count_errors(reference, hypothesis), kaldialign.edit_distance(list(reference), list(hypothesis))
    assert (ours.errors, ours.reference_length) == (theirs["total"], theirs["ref_len"])
    assert count_errors(list(reference), list(hypothesis)) == ours


@settings(max_examples=50, deadline=None)
@given(WORDS, WORDS, WORDS)
def test_a_distance_is_a_metric(one, two, three):
    def distance(a, b):
        return count_errors(a, b).errors

    assert distance(one, two) == distance(two, one)
    assert (distance(one, two) == 0) == (one == two)
    assert distance(one, three) <= distance(one, two) + distance(two, three)


def test_an_empty_reference_counts_its_insertions_as_jiwer_does():
    assert count_errors([], ["a", "b"]).rate == jiwer.process_words("", "a b").wer == 2
    assert count_errors([], []).rate == 0


def test_rates_by_hand():
    """Rates 0, 1/4, 2/2 (failed) and 3/5: mean .4625, 6 errors of 15 units, median (.25 + .6) / 2."""
    counts = [ErrorCounts(0, 0, 0, 4), ErrorCounts(1, 0, 0, 4), ErrorCounts(0, 2, 0, 2), ErrorCounts(1, 1, 1, 5)]
    rates = aggregate(counts, [False, False, True, False])
    assert (rates.utterances, rates.failures, rates.headline) == (4, 1, "macro")
    assert rates.macro == pytest.approx(0.4625)
    assert rates.corpus == pytest.approx(6 / 15)
    assert rates.median == pytest.approx(0.425)
    assert rates.share_above_half == 0.5
    assert rates.macro_below_half == pytest.approx(0.125)
    assert rates.macro_without_failures == pytest.approx((0.25 + 0.6) / 3)
    assert (rates.substitutions, rates.deletions, rates.insertions, rates.reference_length) == (2, 3, 1, 15)


def test_half_itself_is_not_above_half():
    """As the official script has it: above 0.5 only."""
    assert aggregate([ErrorCounts(1, 0, 0, 2)]).share_above_half == 0


def test_nothing_has_no_rate():
    with pytest.raises(ValueError, match="at least one utterance"):
        aggregate([])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.builds(ErrorCounts, *[st.integers(0, 9)] * 3, st.integers(1, 9)), min_size=1, max_size=8))
def test_rates_do_not_depend_on_the_order(counts):
    one, other = aggregate(counts), aggregate(counts[::-1])
    assert one.macro == pytest.approx(other.macro)
    assert (one.corpus, one.median, one.share_above_half) == (other.corpus, other.median, other.share_above_half)
