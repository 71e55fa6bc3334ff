# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
import torch

from tts_align.models.tokenizer import FiniteScalarQuantiser, FSQTokenizer


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
