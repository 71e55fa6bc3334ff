# SPDX-License-Identifier: Apache-2.0
"""Bridges that stand for tables: exact in the codebook's span, wider where its rank prevents that, with gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import legendre

from tts_align.models.base.bridges import MAX_DEGREE, Bridge, Coordinates, fitted, words
from tts_align.models.codec.fsq import FSQTokenizer


def codebook_of(levels: tuple[int, ...] = (5, 4, 3), channels: int = 16, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    tokenizer = FSQTokenizer(4, 2, levels, 8, 1, 3, channels)
    return tokenizer.embed(torch.arange(tokenizer.codebook_size)[None])[0].detach()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 24))
def test_a_table_in_the_span_is_met_exactly(seed: int, width: int):
    codebook = codebook_of(seed=seed)
    table = codebook @ torch.randn(codebook.shape[1], width) + torch.randn(width)  # a constant is in the span, too
    fit = fitted(codebook, table)
    assert (fit.degree, fit.bridge.coordinates) == (1, None)
    assert fit.error < 1e-3
    torch.testing.assert_close(fit.bridge(codebook), table, rtol=1e-3, atol=1e-3)
    assert "a linear image" in str(fit)


def test_where_the_rank_prevents_it_the_projection_grows():
    """A cubic of the digits: linear misses it, degree 3 does not; a random table keeps an honest error."""
    codebook = codebook_of()
    digits = torch.tensor([[i % 5, i // 5 % 4, i // 20] for i in range(60)]).float()
    cubic = (digits @ torch.randn(3, 7)) ** 3
    fit = fitted(codebook, cubic)
    assert fit.degree == 3
    assert fit.error < 0.01
    free = torch.randn(60, 7)
    fit = fitted(codebook, free)
    missing = torch.linalg.vector_norm(fit.bridge(codebook) - free) / torch.linalg.vector_norm(free)
    assert fit.error == pytest.approx(missing.item(), rel=1e-4)
    assert 0.01 < fit.error < 1
    assert 1 < fit.degree <= MAX_DEGREE
    assert len(fit.bridge.coordinates.products) < 60


def test_coordinates_are_products_of_legendre_polynomials_in_reach():
    codebook = codebook_of()
    coordinates = Coordinates(codebook, 3).double()
    wide = codebook.double()
    place = ((wide - coordinates.centre) @ coordinates.axes.T).numpy()
    assert place.shape[1] == 3  # as many as there are digits
    assert np.abs(place).max() == pytest.approx(1, abs=1e-5)
    expected = []
    for powers in coordinates.products:
        one = np.ones(len(place))
        for axis, power in enumerate(powers):
            one = one * legendre.legval(place[:, axis], [0] * power + [1])
        expected.append(one)
    np.testing.assert_allclose(coordinates(wide).numpy(), np.stack(expected, -1), atol=1e-9)
    assert max(map(sum, coordinates.products)) == 3
    assert len(coordinates.products) == 20  # 3 + 3 over 3


def test_gradients_pass_a_wide_bridge():
    codebook = codebook_of()
    bridge = Bridge(16, 5, Coordinates(codebook, 3)).double()
    vectors = codebook[:4].double().requires_grad_()
    assert torch.autograd.gradcheck(bridge, (vectors,))


def test_names_are_listed_as_in_a_sentence():
    assert words(["a"]) == "a"
    assert words(["a", "b", "c"]) == "a, b and c"
