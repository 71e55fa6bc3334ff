# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_align.evaluation.readings.choice import choose, distinct, total

logs = st.floats(-200, 0)


def test_spellings_of_a_reading_are_added_up() -> None:
    """Two spellings of one reading outweigh the likelier single spelling of the other: 0.3 + 0.3 against 0.4."""
    heard = {"a": [math.log(0.3), math.log(0.3)], "b": [math.log(0.4)]}
    chosen = choose(heard, ["b"], min_margin=0.1)
    assert chosen.reading == "a"
    assert chosen.margin == pytest.approx(math.log(0.4 / 0.6))


def test_what_is_expected_without_any_sound_is_taken_away() -> None:
    """The frequent reading is always likelier; the sound speaks for the rare one."""
    heard, unheard = {"often": [-3.0], "rarely": [-5.0]}, {"often": [-1.0], "rarely": [-6.0]}
    assert choose(heard, ["often"], 0.5).reading == "often"
    assert choose(heard, ["often"], 0.5, unheard).reading == "rarely"
    assert choose(heard, ["often"], 0.5, unheard).margin == pytest.approx(-3.0)


@pytest.mark.parametrize(
    ("heard", "right"),
    [
        ({"a": [-1.0], "b": [-1.4]}, ["a"]),  # too close
        ({"a": [-1.0], "b": [-1.0]}, ["a"]),  # no difference, whatever the margin
        ({"a": [-1.0], "b": [-math.inf]}, ["a"]),  # b cannot be spelled in this sound at all: not comparable
        ({"a": [-1.0], "b": []}, ["a"]),  # no spelling
        ({"a": [-1.0]}, ["a"]),  # nothing to choose from
        ({"a": [math.nan], "b": [-1.0]}, ["a"]),
        ({}, []),
    ],
)
def test_the_judge_abstains(heard: dict[str, list[float]], right: list[str]) -> None:
    assert choose(heard, right, min_margin=0.5).abstained


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(logs, min_size=1, max_size=3), min_size=2), st.floats(0, 5))
def test_margin_and_choice_agree(heard: dict[str, list[float]], min_margin: float) -> None:
    right = [sorted(heard)[0]]
    chosen = choose(heard, right, min_margin)
    slow = {name: float(np.log(np.exp(np.array(one)).sum())) for name, one in heard.items()}
    margin = slow[right[0]] - max(score for name, score in slow.items() if name not in right)
    assert chosen.margin == pytest.approx(margin, abs=1e-9)
    if not chosen.abstained:
        assert (chosen.reading in right) == (chosen.margin > 0)
        assert abs(chosen.margin) >= min_margin


@given(st.lists(logs, min_size=1, max_size=5), st.floats(-300, 300))
def test_a_sum_of_probabilities_moves_with_a_constant(values: list[float], shift: float) -> None:
    assert total([one + shift for one in values]) == pytest.approx(total(values) + shift, abs=1e-9)


def test_no_probability_at_all() -> None:
    assert total([]) == total([-math.inf]) == -math.inf


def test_what_several_readings_share_tells_nothing() -> None:
    assert distinct({"a": ["x", "y"], "b": ["y"]}) == {"a": ("x",), "b": ()}
