# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from tts_align import gumbel
from tts_align.gumbel import (
    RowNoise,
    annealed,
    gumbel_softmax_st,
    posterior_noise,
    relaxed_tokens,
    row_generators,
    sampled_vectors,
)

CODES = 7


def tensors(m=9, vocabulary=10, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(m, vocabulary, generator=random, dtype=dtype)
    noise = -torch.empty(m, CODES, dtype=dtype).exponential_(generator=random).log()
    return logits.requires_grad_(), noise


def naive(logits, noise, temperature, hard):
    """The formula as it is printed, with autograd."""
    soft = torch.exp((logits[:, :CODES] + noise) / temperature)
    soft = soft / soft.sum(-1, keepdim=True)
    if not hard:
        return soft
    one_hot = torch.nn.functional.one_hot((logits[:, :CODES] + noise).argmax(-1), CODES)
    return one_hot + soft - soft.detach()


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_value_and_gradient_are_those_of_the_formula(hard, temperature, monkeypatch):
    monkeypatch.setitem(gumbel._BLOCK, "cpu", 2 * CODES)  # two positions at a time, the last block is smaller
    logits, noise = tensors()
    weight = torch.randn(9, CODES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = noise.clone()
    ours, theirs = gumbel_softmax_st(logits, CODES, noise, temperature, hard), naive(logits, noise, temperature, hard)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (found,) = torch.autograd.grad((ours * weight).sum(), logits)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not found[:, CODES:].any()
    assert torch.equal(noise, kept)


def test_gradient_of_soft_samples_is_the_derivative():
    logits, noise = tensors(m=3)
    assert torch.autograd.gradcheck(lambda x: gumbel_softmax_st(x, CODES, noise, 0.7, hard=False), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_samples_are_exactly_one_hot_and_special_ids_are_never_drawn(dtype):
    logits, noise = tensors(m=200, dtype=torch.float32)
    with torch.no_grad():
        logits[:, CODES:] = 100.0  # end-of-speech is what the model wants most
    logits = logits.detach().to(dtype).requires_grad_()
    sample = gumbel_softmax_st(logits, CODES, noise)
    assert sample.dtype == torch.float32
    assert sample.shape == (200, CODES)
    assert set(sample.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(sample.argmax(-1), (logits[:, :CODES].float() + noise).argmax(-1))
    assert (sample.sum(-1) == 1).all()
    sample[:, 0].sum().backward()
    assert logits.grad.dtype == dtype


def test_large_logits_do_not_overflow():
    logits, noise = tensors(dtype=torch.float32)
    sample = gumbel_softmax_st((logits * 1e4).detach(), CODES, noise, 0.1, hard=False)
    assert sample.isfinite().all()
    torch.testing.assert_close(sample.sum(-1), torch.ones(9))


def test_nothing_to_sample():
    logits = torch.zeros(0, 9, requires_grad=True)
    sample = gumbel_softmax_st(logits, CODES, RowNoise((), ()))
    assert sample.shape == (0, CODES)
    sample.sum().backward()
    assert logits.grad.shape == (0, 9)


def test_noise_of_a_row_is_its_own():
    lengths, seeds = (3, 1, 20), (11, 12, 13)
    together = RowNoise(row_generators(seeds), lengths).draw(CODES, "cpu")
    alone = [RowNoise(row_generators([s]), (n,)).draw(CODES, "cpu") for s, n in zip(seeds, lengths, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    logits = torch.randn(24, 9, generator=torch.Generator().manual_seed(0))
    drawn = gumbel_softmax_st(logits, CODES, RowNoise(row_generators(seeds), lengths))
    assert torch.equal(drawn, gumbel_softmax_st(logits, CODES, together))
    generators = row_generators(seeds)
    first, second = (RowNoise(generators, lengths).draw(CODES, "cpu") for _ in range(2))
    assert not torch.equal(first, second)  # generators go on


def test_frequencies_are_the_softmax():
    """Pearson's statistic of 40,000 draws over 7 tokens stays under its 99.9 % point (6 degrees of freedom: 22.5)."""
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5, -2.0, 0.0, 9.0]]).expand(40_000, -1)
    drawn = gumbel_softmax_st(logits, CODES, RowNoise(row_generators([5]), (40_000,))).sum(0)
    expected = 40_000 * logits[0, :CODES].softmax(-1)
    assert float(((drawn - expected) ** 2 / expected).sum()) < 22.5


def test_noise_has_the_moments_of_a_gumbel_distribution():
    noise = RowNoise(row_generators([2]), (40_000,)).draw(CODES, "cpu", torch.float64)
    assert float(noise.mean()) == pytest.approx(0.5772157, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert noise.isfinite().all()


@pytest.mark.parametrize(("hard", "held"), [(True, 2), (False, 1)])
def test_no_more_than_sample_and_probabilities_are_kept(hard, held):
    """Storage that autograd keeps, the logits left out."""
    logits, _ = tensors(dtype=torch.float32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sample = gumbel_softmax_st(logits, CODES, RowNoise(row_generators([1]), (9,)), hard=hard)
    kept[sample.untyped_storage().data_ptr()] = sample.numel()
    assert sum(kept.values()) == held * 9 * CODES


def test_schedule():
    assert [annealed(step, 10) for step in (0, 5, 10, 11)] == pytest.approx([2.0, 1.4, 0.8, 0.8])
    assert annealed(1, 2, 1.0, 3.0) == 2.0
    with pytest.raises(ValueError, match="steps of at least 1"):
        annealed(0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"codebook_size": 11}, "speech tokens in 1..10, the width of the logits, got 11"),
        ({"noise": torch.zeros(9, 3)}, r"noise of shape \(9, 7\), got \(9, 3\)"),
        ({"noise": RowNoise(row_generators([1]), (4,))}, r"noise of shape \(9, 7\), got \(4, 7\)"),
    ],
)
def test_mistakes_are_named(change, message):
    logits, noise = tensors(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        gumbel_softmax_st(logits, **({"codebook_size": CODES, "noise": noise} | change))
    with pytest.raises(ValueError, match="one generator for each of the 2 rows, got 1"):
        RowNoise(row_generators([1]), (1, 2))


def test_noise_of_a_sample_that_is_already_there():
    """The chosen token wins; over draws of the code, the noise is a standard Gumbel number again, everywhere."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -2.0, 0.0, 9.0]).expand(40_000, -1).contiguous()
    chosen = torch.multinomial(logits[0, :CODES].softmax(-1), 40_000, True, generator=torch.Generator().manual_seed(3))
    noise = posterior_noise(logits, CODES, chosen, RowNoise(row_generators([4]), (40_000,)))
    assert torch.equal((logits[:, :CODES] + noise).argmax(-1), chosen)
    assert torch.equal(gumbel_softmax_st(logits, CODES, noise).argmax(-1), chosen)
    torch.testing.assert_close(noise.mean(0), torch.full((CODES,), 0.5772157), rtol=0, atol=0.03)
    torch.testing.assert_close(noise.var(0), torch.full((CODES,), math.pi**2 / 6), rtol=0, atol=0.08)
    # Two codes' numbers are as independent as they were before anything was chosen.
    assert abs(float(torch.corrcoef(noise.T)[0, 3])) < 0.02


def test_a_chosen_code_wins_however_improbable_and_special_ids_do_no_harm():
    logits = torch.tensor([[0.0, 1e4, -1e4, 0.0], [0.0, 1e4, -1e4, 0.0]])
    noise = posterior_noise(logits, 3, torch.tensor([2, 3]), RowNoise(row_generators([1, 2]), (1, 1)))
    assert noise.isfinite().all()
    assert (logits[:, :3] + noise).argmax(-1)[0] == 2


@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_looked_up_vectors_are_one_hots_times_the_table(resample, temperature, monkeypatch):
    """Value, gradient of the logits and of the table; the formulas have nothing in common but their noise."""
    monkeypatch.setitem(gumbel._BLOCK, "cpu", 2 * CODES)
    logits, _ = tensors()
    random = torch.Generator().manual_seed(6)
    table = torch.randn(CODES, 4, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, generator=random, dtype=torch.float64)
    target = torch.tensor([0, 3, 6, 9, 1, 2, 5, 8, 4])  # 8 and 9 are special
    rows = [RowNoise(row_generators([3, 4]), (4, 5)) for _ in range(2)]
    ours = sampled_vectors(logits, table, rows[0], temperature, None if resample else target)
    theirs = relaxed_tokens(logits, CODES, target, rows[1], temperature, resample=resample) @ table
    assert torch.equal(ours, theirs)
    found, expected = (torch.autograd.grad((one * weight).sum(), (logits, table)) for one in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not found[0][:, CODES:].any()
    assert found[0].abs().max() > 0.01


def test_looked_up_vectors_hold_one_tensor_and_stand_extremes():
    logits = torch.tensor([[0.0, 1e4, -1e4, 0.0], [3e38, -3e38, 0.0, 9.0]], requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = sampled_vectors(logits, torch.eye(3), RowNoise(row_generators([1]), (2,)), 0.5, torch.tensor([2, 3]))
    assert sum(kept.values()) == 2 * 3 + 2 + 9  # soft samples, ids, the table
    assert found.argmax(-1).tolist() == [2, 2]
    found[:, 0].sum().backward()
    assert logits.grad.isfinite().all()
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        sampled_vectors(logits, torch.eye(3), RowNoise(row_generators([1]), (2,)), 0.0)
    with pytest.raises(ValueError, match=r"noise of shape \(2, 3\), got \(1, 3\)"):
        sampled_vectors(logits, torch.eye(3), RowNoise(row_generators([1]), (1,)))
