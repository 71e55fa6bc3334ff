# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, divergences and masked sums against plain loops."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from processes import side_by_side

from tts_align import logprobs
from tts_align.batch import Mean, across_ranks
from tts_align.logprobs import chosen_logp, full_kl, masked_mean, masked_sum


def slow_logp(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


def test_golden_values():
    """Logits ln 1, ln 2, ln 5: shares 1/8, 2/8, 5/8. Against equal thirds KL is Σ p ln 3p = 0.198209."""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    assert chosen_logp(logits, torch.tensor([2])).item() == pytest.approx(math.log(5 / 8), abs=1e-6)
    expected = sum(p * math.log(3 * p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert full_kl(logits, torch.zeros(1, 3)).item() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(2, 9))
def test_equal_loops(seed: int, count: int, size: int):
    random = torch.Generator().manual_seed(seed)
    ours, theirs = (4 * torch.randn(count, size, generator=random) for _ in range(2))
    target = torch.randint(size, (count,), generator=random)
    logp, kl = chosen_logp(ours, target), full_kl(ours, theirs)
    for i in range(count):
        p, q = slow_logp(ours[i].tolist()), slow_logp(theirs[i].tolist())
        assert logp[i].item() == pytest.approx(p[target[i]], abs=1e-5)
        assert kl[i].item() == pytest.approx(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)), abs=1e-5)
    assert (kl >= -1e-6).all()


def test_a_token_that_cannot_be_said_has_no_part_in_the_divergence():
    """0 log 0 is 0: tokens at -inf in both models, or in the policy alone, make no NaN; in the reference, infinity."""
    policy, reference = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 5)
    policy[:, 3] = reference[0, 3] = -torch.inf
    policy.requires_grad_()
    found = full_kl(policy, reference)
    p, q = policy.detach().softmax(-1), reference.softmax(-1)
    expected = torch.special.xlogy(p, p / q).nan_to_num(0).sum(-1)
    assert torch.allclose(found, expected)
    found.sum().backward()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()
    assert full_kl(torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]])).isposinf()


def test_the_same_distribution_has_no_divergence():
    logits = torch.randn(4, 7)
    assert full_kl(logits, logits).tolist() == [0.0] * 4
    torch.testing.assert_close(full_kl(logits, logits + 3), torch.zeros(4), rtol=0, atol=1e-6)


def test_half_precision_is_summed_in_full():
    logits = (8 * torch.randn(5, 300, generator=torch.Generator().manual_seed(0))).bfloat16()
    target = torch.arange(5)
    found = chosen_logp(logits, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, chosen_logp(logits.float(), target), rtol=0, atol=0)
    assert full_kl(logits, logits).dtype == torch.float32


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(st.floats(-9, 9, width=32), st.booleans()), min_size=3, max_size=3), min_size=1))
def test_masked_sums_and_means(rows: list[list[tuple[float, bool]]]):
    values = torch.tensor([[value for value, _ in row] for row in rows])
    mask = torch.tensor([[on for _, on in row] for row in rows])
    for i, row in enumerate(rows):
        kept = [value for value, on in row if on]
        assert masked_sum(values, mask)[i].item() == pytest.approx(sum(kept), abs=1e-4)
        assert masked_mean(values, mask)[i].item() == pytest.approx(sum(kept) / max(len(kept), 1), abs=1e-4)


def test_what_is_masked_may_be_anything():
    values, mask = torch.tensor([[1.0, torch.nan, torch.inf]]), torch.tensor([[True, False, False]])
    assert masked_sum(values, mask).tolist() == masked_mean(values, mask).tolist() == [1.0]
    assert masked_mean(values, torch.zeros_like(mask)).tolist() == [0.0]


def test_shapes_in_annotations_are_checked_while_tests_run():
    """They are switched off in files of whole runs, and must come back behind these."""
    with pytest.raises(Exception, match="size of dimension t is 4"):
        masked_sum(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.bool))


def test_alone_there_are_no_other_ranks():
    mean = Mean.of(torch.tensor([1.0, 2.0]))
    assert across_ranks(mean) is mean


def _rank(rank: int, store: str, found: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    values = torch.tensor([1.0, 2.0, 6.0]) if rank == 0 else torch.zeros(0)  # the second rank has nothing to add
    mean = across_ranks(Mean.of(values))
    torch.save((mean.total, mean.count), f"{found}{rank}")
    dist.destroy_process_group()


def test_a_rank_without_values_takes_part(tmp_path):
    side_by_side(_rank, str(tmp_path / "store"), str(tmp_path / "found"))
    for rank in range(2):
        total, count = torch.load(tmp_path / f"found{rank}")
        assert (total.item(), count.item()) == (9.0, 3.0)


@pytest.mark.parametrize("block", [2**19, 7, 14])
def test_divergences_have_torchs_gradient_and_hold_one_tensor(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(logprobs._BLOCK, "cpu", block)
    random = torch.Generator().manual_seed(0)
    ours, theirs = (3 * torch.randn(9, 7, generator=random, dtype=torch.float64) for _ in range(2))
    ours.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: full_kl(logits, theirs), (ours,))
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = full_kl(ours, theirs)
    assert kept == [ours.numel()]
    expected = torch.nn.functional.kl_div(
        theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="sum"
    )
    (pull,) = torch.autograd.grad(found.sum(), ours)
    torch.testing.assert_close(pull, torch.autograd.grad(expected, ours)[0])
    with torch.no_grad():
        assert not full_kl(ours, theirs).requires_grad


@pytest.mark.parametrize("block", [1, 7, 14, 30])
def test_divergences_do_not_depend_on_the_blocks(block: int, monkeypatch: pytest.MonkeyPatch):
    ours, theirs = torch.randn(9, 7), torch.randn(9, 7)
    whole = full_kl(ours, theirs)
    monkeypatch.setitem(logprobs._BLOCK, "cpu", block)
    torch.testing.assert_close(full_kl(ours, theirs), whole, rtol=0, atol=1e-7)
    assert full_kl(ours[:0], theirs[:0]).shape == (0,)


def test_known_sums_and_no_gradient_change_no_number(monkeypatch: pytest.MonkeyPatch):
    random = torch.Generator().manual_seed(3)
    policy, reference = (torch.randn(5, 7, generator=random) for _ in range(2))
    policy.requires_grad_()
    plain = full_kl(policy, reference)
    known = full_kl(policy, reference, policy.detach().logsumexp(-1), reference.logsumexp(-1))
    torch.testing.assert_close(known, plain)
    one, other = (torch.autograd.grad(found.sum(), policy)[0] for found in (known, plain))
    torch.testing.assert_close(one, other)
    made: list[torch.Size] = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda like, **options: made.append(like.shape) or empty_like(like))
    with torch.no_grad():
        torch.testing.assert_close(full_kl(policy, reference), plain.detach())
    assert not made  # a gradient that nobody asks for is not made, either
    full_kl(policy, reference)
    assert made == [policy.shape]
