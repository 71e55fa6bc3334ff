# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_align.evaluation.metrics.functional import cer, character_errors, nearest_cer, normalise

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
