# SPDX-License-Identifier: Apache-2.0
"""KTO's mismatched rows: never under an equal text, whatever the data (rule 3)."""

from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from tts_align.data.mismatch import partners

rows = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=2, max_size=300)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows.filter(lambda r: len({text for text, _ in r}) > 1), st.integers(0, 9))
def test_never_an_equal_text(rows: list[tuple[int, int]], seed: int):
    texts, lengths = zip(*rows, strict=True)
    partner = partners(texts, lengths, seed)
    assert (partner == partners(texts, lengths, seed)).all()
    assert all(texts[i] != texts[j] for i, j in enumerate(partner))
    if 2 * max(Counter(texts).values()) <= len(texts):
        assert sorted(partner) == list(range(len(texts)))  # each row lends its speech once


def test_partners_are_of_similar_length():
    generator = np.random.default_rng(0)
    texts = generator.integers(0, 500, 4000).tolist()
    lengths = generator.integers(30, 300, 4000)
    partner = partners(texts, lengths.tolist(), 0)
    assert np.abs(lengths - lengths[partner]).mean() < 4
    assert (partner != partners(texts, lengths.tolist(), 1)).mean() > 0.9


def test_one_sentence_alone_is_refused():
    with pytest.raises(ValueError, match="at least two sentences, but all rows have the same text"):
        partners(["a", "a", "a"], [1, 2, 3], 0)
