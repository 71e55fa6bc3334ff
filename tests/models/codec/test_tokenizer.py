# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from tts_align.models.codec.fsq import SHRINK, FiniteScalarQuantiser, FSQTokenizer


@pytest.fixture
def tokenizer() -> FSQTokenizer:
    torch.manual_seed(0)
    return FSQTokenizer(
        mel_channels=6,
        frames_per_token=4,
        levels=(5, 4, 3),
        hidden_channels=16,
        blocks=2,
        kernel_size=3,
        embedding_channels=8,
    ).eval()


@pytest.mark.parametrize("levels", [(3,), (5, 5), (4, 3, 2), (8, 5, 5)])
def test_index_is_the_formula(levels):
    """index = sum_j h_j * prod(levels[:j]), h_j = round((tanh(x) + 1) / 2 * (levels[j] - 1)), in plain Python."""
    latent = torch.randn(50, len(levels), generator=torch.Generator().manual_seed(1)) * 2
    tokens, values = FiniteScalarQuantiser(levels)(latent)
    for row, token, value in zip(latent.tolist(), tokens.tolist(), values.tolist(), strict=True):
        digits = [round((math.tanh(x) + 1) / 2 * (level - 1)) for x, level in zip(row, levels, strict=True)]
        assert token == sum(h * math.prod(levels[:j]) for j, h in enumerate(digits))
        assert value == pytest.approx(
            [2 * h / (level - 1) - 1 for h, level in zip(digits, levels, strict=True)], abs=1e-5
        )


def test_every_index_has_its_own_values_and_they_quantise_to_it():
    quantiser = FiniteScalarQuantiser((5, 4, 3))
    tokens = torch.arange(quantiser.codebook_size)
    values = quantiser.values(tokens)
    expected = {
        tuple(round(2 * h / (n - 1) - 1, 4) for h, n in zip(hs, (5, 4, 3), strict=True))
        for hs in itertools.product(range(5), range(4), range(3))
    }
    assert {tuple(round(v, 4) for v in row) for row in values.tolist()} == expected
    again, _ = quantiser(torch.atanh(values * 0.999))
    assert again.tolist() == tokens.tolist()


def test_gradient_passes_the_rounding_unchanged():
    """d value / d latent is that of tanh alone: 1 - tanh(x)^2."""
    latent = torch.tensor([[0.3, -1.2, 0.0]], requires_grad=True)
    FiniteScalarQuantiser((5, 4, 3))(latent)[1].sum().backward()
    assert latent.grad is not None
    assert latent.grad[0].tolist() == pytest.approx([1 - math.tanh(x) ** 2 for x in (0.3, -1.2, 0.0)], abs=1e-6)


def test_wrong_levels_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        FiniteScalarQuantiser((5, 1))


def test_embedding_of_the_tokens_is_what_the_tokenizer_hands_on(tokenizer):
    out = tokenizer(torch.randn(2, 12, 6), torch.tensor([12, 8]))
    torch.testing.assert_close(tokenizer.embed(out.tokens), out.embedding)


def test_padding_and_neighbours_never_reach_a_code(tokenizer):
    generator = torch.Generator().manual_seed(2)
    long, short = torch.randn(1, 22, 6, generator=generator), torch.randn(1, 9, 6, generator=generator)
    alone = tokenizer(short, torch.tensor([9]))
    batch = torch.cat([long, torch.nn.functional.pad(short, (0, 0, 0, 13), value=7.0)])
    together = tokenizer(batch, torch.tensor([22, 9]))
    assert together.mask.sum(-1).tolist() == [6, 3], "a partly filled token counts"
    assert together.tokens[1][together.mask[1]].tolist() == alone.tokens[0].tolist()
    torch.testing.assert_close(together.embedding[1, :3], alone.embedding[0])


def test_changing_a_frame_changes_an_embedding(tokenizer):
    log_mel = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(3))
    changed = log_mel.clone()
    changed[0, 5] += 5.0
    frames = torch.tensor([12])
    assert not torch.equal(tokenizer(log_mel, frames).embedding, tokenizer(changed, frames).embedding)


def published(z: float) -> int:
    """The digit of the published tokenizers, in single precision, by a calculator of another library."""
    return int(np.round(np.float32(0.9990000128746033) * np.tanh(np.float32(z)))) + 1


@pytest.mark.parametrize("seed", range(3))
def test_shrunken_digits_are_those_of_the_published_tokenizers(seed):
    """d = round(0.9990000128746033 tanh(z)) + 1, index = sum of d_i 3^i with the first dimension lowest."""
    latent = torch.randn(200, 8, generator=torch.Generator().manual_seed(seed)) * 1.5
    quantiser = FiniteScalarQuantiser(shrink=SHRINK)
    tokens, values = quantiser(latent)
    expected = [[published(z) for z in row] for row in latent.tolist()]
    assert values.tolist() == [[d - 1 for d in row] for row in expected], "exactly -1, 0 and 1"
    assert tokens.tolist() == [sum(d * 3**i for i, d in enumerate(row)) for row in expected]


def test_where_the_digits_change():
    """At tanh(z) = 0.5 / 0.999, a little above the middle; without the factor at 0.5."""
    border = math.atanh(0.5 / SHRINK)
    latent = torch.tensor([[border - 1e-5], [border + 1e-5], [-border + 1e-5], [-border - 1e-5], [99.0], [-99.0]])
    assert FiniteScalarQuantiser((3,), SHRINK)(latent)[0].tolist() == [1, 2, 1, 0, 2, 0]
    between = torch.tensor([[(math.atanh(0.5) + border) / 2]])
    assert FiniteScalarQuantiser((3,), SHRINK)(between)[0].item() == 1
    assert FiniteScalarQuantiser((3,))(between)[0].item() == 2


def test_next_to_a_border_nothing_is_lost_by_counting_from_zero():
    """Round, then add: the sum of a number just below a half and 1 would itself be rounded up."""
    bits = torch.tensor([math.atanh(0.5 / SHRINK)]).view(torch.int32) + torch.arange(-40, 41, dtype=torch.int32)
    latent = bits.view(torch.float32)[:, None]
    bounded = (SHRINK * latent.tanh())[:, 0].tolist()
    assert any(0.5 - 2**-24 <= number <= 0.5 for number in bounded), "where it matters"
    assert FiniteScalarQuantiser((3,), SHRINK)(latent)[0].tolist() == [round(number) + 1 for number in bounded]


@pytest.mark.parametrize("shrink", [None, SHRINK, 1.0])
@pytest.mark.parametrize("levels", [(3,) * 8, (2,), (5, 4, 3), (8, 6, 5)])
def test_every_index_round_trips(levels, shrink):
    quantiser = FiniteScalarQuantiser(levels, shrink)
    tokens = torch.arange(math.prod(levels))
    values = quantiser.values(tokens)
    assert len(values.unique(dim=0)) == quantiser.codebook_size == math.prod(levels)
    again, same = quantiser(torch.atanh(values * 0.9999))
    assert torch.equal(again, tokens)
    torch.testing.assert_close(same, values)
    table = quantiser.codebook()
    for token in (0, 1, len(table) // 2, len(table) - 1):
        digits = [token // math.prod(levels[:j]) % level for j, level in enumerate(levels)]
        assert table[token].tolist() == pytest.approx(
            [2 * d / (n - 1) - 1 for d, n in zip(digits, levels, strict=True)]
        )


@pytest.mark.parametrize("levels", [(3, 3), (4, 5)])
def test_gradient_is_that_of_the_bounded_numbers_alone(levels):
    """In double precision, against differences of shrink * tanh under the function that is linear where we stand."""
    quantiser = FiniteScalarQuantiser(levels, SHRINK)
    latent = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    slope = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def surrogate(z):
        return (SHRINK * torch.tanh(z) * slope).sum()

    (found,) = torch.autograd.grad((quantiser(latent)[1] * slope).sum(), latent)
    step = 1e-6
    for place in itertools.product(range(6), range(2)):
        up, down = latent.detach().clone(), latent.detach().clone()
        up[place] += step
        down[place] -= step
        assert found[place].item() == pytest.approx((surrogate(up) - surrogate(down)).item() / (2 * step), rel=1e-6)


def test_half_precision_rounds_as_single_precision_does():
    latent = torch.randn(300, 8, generator=torch.Generator().manual_seed(6)).bfloat16()
    quantiser = FiniteScalarQuantiser(shrink=SHRINK)
    tokens, values = quantiser(latent)
    assert torch.equal(tokens, quantiser(latent.float())[0])
    assert values.dtype == torch.bfloat16


def test_soft_tokens_are_mixtures_and_hard_ones_exactly_their_index(tokenizer):
    tokens = torch.randint(60, (2, 7), generator=torch.Generator().manual_seed(7))
    assert torch.equal(tokenizer.embed(functional.one_hot(tokens, 60).float()), tokenizer.embed(tokens))
    soft = torch.rand(2, 7, 60, generator=torch.Generator().manual_seed(8)).softmax(-1).requires_grad_()
    by_hand = sum(soft[..., k, None] * tokenizer.embed(torch.full((1, 1), k)) for k in range(60))
    torch.testing.assert_close(tokenizer.embed(soft), by_hand, atol=1e-5, rtol=1e-5)
    tokenizer.embed(soft).sum().backward()
    assert soft.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="each of the 60 speech tokens, got 63"):
        tokenizer.embed(torch.zeros(1, 2, 63))


def test_it_is_a_published_quantiser_at_25_hertz_by_default():
    with torch.device("meta"):
        model = FSQTokenizer()
    assert model.codebook_size == 6561
    assert model.frames_per_token == 100 // 25
    assert model.quantiser.shrink == SHRINK == np.float32(0.999)


def test_gradient_reaches_the_features_but_not_the_padding(tokenizer):
    log_mel = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(9), requires_grad=True)
    out = tokenizer(log_mel, torch.tensor([12, 5]))
    out.embedding[out.mask].square().sum().backward()
    assert tokenizer.stem.weight.grad.abs().sum() > 0
    assert log_mel.grad[1, 5:].abs().max() == 0
    assert (log_mel.grad[1, :5].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("shrink", [0.0, 1.1, -1.0])
def test_wrong_shrink_is_refused(shrink):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        FiniteScalarQuantiser((3,), shrink)
