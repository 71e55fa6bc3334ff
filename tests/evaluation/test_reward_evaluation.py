# SPDX-License-Identifier: Apache-2.0
"""What a test of a reward model counts, by hand and against other libraries."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torchmetrics.functional.regression import spearman_corrcoef

from tts_align.evaluation.reward import measure, print_numbers
from tts_align.models.reward.config import Attribute

MOOD = Attribute("mood", "classes", ("happy", "sad"))
EVENTS = Attribute("events", "events", ("cough", "laugh"))
MOS = Attribute("mos", "mos")


def answer(said: str | None = None, heard: str | None = None, **both: tuple[Any, Any]) -> dict[str, Any]:
    """What is known and what the model says: attributes as (known, predicted)."""
    return {
        "said": said,
        "heard": heard,
        "known": {name: known for name, (known, _) in both.items() if known is not None},
        "predicted": {name: predicted for name, (_, predicted) in both.items()},
    }


def test_error_rate_is_the_mean_over_utterances_of_which_the_transcript_is_known():
    found = measure([answer("abcd", "abxd"), answer("ab", "ab"), answer(None, "zz"), answer("a", "abc")], ())
    assert found["cer"]["value"] == pytest.approx((0.25 + 0 + 2) / 3)
    assert found["cer"]["n"] == 3
    assert found["cer"]["low"] <= found["cer"]["value"] <= found["cer"]["high"]


def test_accuracy_of_classes_and_events():
    answers = [
        answer(mood=("sad", 1), events=("cough", [True, True])),
        answer(mood=("happy", 1), events=("", [False, False])),
        answer(mood=(None, 0), events=(None, [False, False])),
    ]
    found = measure(answers, (MOOD, EVENTS))
    assert found["mood_accuracy"]["value"] == pytest.approx(1 / 2)
    assert found["mood_accuracy"]["n"] == 2
    assert found["events_accuracy"]["value"] == pytest.approx((1 / 2 + 1) / 2)
    assert found.keys() == {"mood_accuracy", "events_accuracy"}


def test_correlations_of_scores_are_those_of_numpy_and_torchmetrics():
    random = np.random.default_rng(0)
    known = random.uniform(1, 5, 40)
    predicted = known + random.normal(0, 1, 40)
    answers = [answer(mos=pair) for pair in zip(known.tolist(), predicted.tolist(), strict=True)]
    found = measure(answers, (MOS,))
    assert found["mos_lcc"]["value"] == pytest.approx(np.corrcoef(predicted, known)[0, 1], abs=1e-5)
    ranks = spearman_corrcoef(torch.from_numpy(predicted), torch.from_numpy(known))
    assert found["mos_srcc"]["value"] == pytest.approx(float(ranks), abs=1e-5)
    assert found["mos_lcc"]["n"] == 40


pairs = st.lists(st.tuples(st.integers(1, 5), st.integers(-5, 5)), min_size=4, max_size=30)


def slow_pearson(one: list[float], two: list[float]) -> float:
    """Covariance over the root of the variances, as in books."""
    a, b = sum(one) / len(one), sum(two) / len(two)
    covariance = sum((x - a) * (y - b) for x, y in zip(one, two, strict=True))
    return covariance / math.sqrt(sum((x - a) ** 2 for x in one) * sum((y - b) ** 2 for y in two))


def slow_ranks(values: list[float]) -> list[float]:
    """How many are smaller, and half of the others that are equal."""
    return [sum(y < x for y in values) + (sum(y == x for y in values) - 1) / 2 for x in values]


@settings(max_examples=100, deadline=None)
@given(pairs)
def test_correlations_are_the_formulas(rows: list[tuple[int, int]]):
    """Ranks to the 1e-6 that torchmetrics adds to the product of their deviations."""
    known, predicted = ([float(one) for one in side] for side in zip(*rows, strict=True))
    found = measure([answer(mos=pair) for pair in zip(known, predicted, strict=True)], (MOS,))
    lcc, srcc = found["mos_lcc"]["value"], found["mos_srcc"]["value"]
    if len(set(predicted)) == 1 or len(set(known)) == 1:
        assert lcc is srcc is None
        return
    assert lcc == pytest.approx(slow_pearson(predicted, known), abs=1e-6)
    ranks = slow_ranks(predicted), slow_ranks(known)
    spread = math.prod(float(np.std(side)) for side in ranks)
    assert srcc == pytest.approx(slow_pearson(*ranks), abs=1e-6 + 1e-6 / spread)


def test_a_score_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="expected finite scores, got NaN"):
        measure([answer(mos=(3.0, math.nan)), answer(mos=(2.0, 2.5))], (MOS,))


def test_a_correlation_of_constants_is_none_and_is_shown_as_such():
    found = measure([answer(mos=(3.0, 2.0)), answer(mos=(3.0, 2.5))], (MOS,))
    assert found["mos_lcc"]["value"] is None
    out = io.StringIO()
    print_numbers(found, Console(file=out, width=80))
    assert "mos_lcc" in out.getvalue()
    assert "-" in out.getvalue()


def test_the_table_shows_intervals():
    out = io.StringIO()
    print_numbers(measure([answer("ab", "ab"), answer("cd", "cx")], ()), Console(file=out, width=80))
    assert "0.250 (0.000–0.500)" in out.getvalue()


def test_nothing_known_is_nothing_measured():
    assert measure([answer(None, "a", mood=(None, 1))], (MOOD,)) == {}
