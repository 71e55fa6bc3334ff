# SPDX-License-Identifier: Apache-2.0
"""Normalisation, rotation, the head and attention inside rows: against slow formulas and transformers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from tts_align.models.policy import kernels
from tts_align.models.policy.attention import RowAttention, flash_can
from tts_align.models.policy.backbone import Turn
from tts_align.models.policy.kernels import rms_norm, rotate, score_targets


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalisation_is_that_of_transformers(dtype: torch.dtype):
    hidden, upstream = drawn(5, 8, dtype=dtype), drawn(5, 8, seed=1, dtype=dtype)
    theirs = Qwen2RMSNorm(8, eps=1e-3).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(drawn(8, seed=2))
    found = rms_norm(hidden, theirs.weight, 1e-3)
    expected = theirs(hidden)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **close)
    inputs = (hidden, theirs.weight)
    for ours, other in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, other, **close)


def test_normalisation_of_what_does_not_train():
    hidden, weight = drawn(3, 4), torch.ones(4)
    rms_norm(hidden, weight, 1e-6).sum().backward()
    assert hidden.grad is not None
    trained = drawn(4, seed=3)
    rms_norm(hidden.detach(), trained, 1e-6).sum().backward()
    assert trained.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rotation_is_that_of_transformers(dtype: torch.dtype):
    vectors, upstream = drawn(6, 3, 8, dtype=dtype), drawn(6, 3, 8, seed=1, dtype=dtype)
    turn = Turn.of(torch.arange(6), 1 / 100.0 ** (torch.arange(0, 8, 2) / 8))
    cosine, sine = (torch.cat([part, part], -1)[None] for part in (turn.cosine, turn.sine))
    wide = vectors.transpose(0, 1)[None].to(torch.promote_types(dtype, torch.float32))
    expected = apply_rotary_pos_emb(wide, wide, cosine, sine)[0][0].transpose(0, 1).to(dtype)
    found = rotate(vectors, turn.cosine, turn.sine)
    torch.testing.assert_close(found, expected)
    (ours,), (theirs,) = (torch.autograd.grad(one, vectors, upstream) for one in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_without_a_gradient_they_are_the_same_to_the_last_bit():
    hidden, weight, vectors = drawn(5, 8), drawn(8, seed=2), drawn(6, 3, 8)
    turn = Turn.of(torch.arange(6), 1 / 100.0 ** (torch.arange(0, 8, 2) / 8))
    normed, turned = rms_norm(hidden, weight, 1e-3), rotate(vectors, turn.cosine, turn.sine)
    with torch.no_grad():
        found = rms_norm(hidden, weight, 1e-3), rotate(vectors, turn.cosine, turn.sine)
    assert [one.grad_fn for one in found] == [None, None]
    assert torch.equal(found[0], normed)
    assert torch.equal(found[1], turned)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("direct", ["logp", "logits", "both"])
def test_the_head_in_blocks(bias: bool, direct: str, monkeypatch: pytest.MonkeyPatch):
    """Log-probabilities, logits and their gradients, with 7 positions in blocks of 3."""
    monkeypatch.setattr(kernels, "_BLOCK", {"cpu": 3 * 11, "cuda": 1})
    hidden, target = drawn(7, 5), torch.tensor([0, 3, 10, 3, 5, 9, 1])
    head = nn.Linear(5, 11, bias=bias)
    inputs = [hidden, *head.parameters()]
    logits = head(hidden)
    logp = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    ours, normaliser, kept = score_targets(hidden, head, target, logits=True)
    assert kept is not None
    for one, other in ((ours, logp), (normaliser, logits.logsumexp(-1)), (kept, logits)):
        torch.testing.assert_close(one, other)
    assert not normaliser.requires_grad
    share, wide = drawn(7, seed=5).detach(), drawn(7, 11, seed=6).detach()

    def loss(logp: Tensor, logits: Tensor) -> Tensor:
        return (logp * share).sum() * (direct != "logits") + (logits * wide).sum() * (direct != "logp")

    found, expected = (torch.autograd.grad(loss(*pair), inputs) for pair in ((ours, kept), (logp, logits)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_head_keeps_no_logits_that_nobody_needs():
    hidden, head = drawn(7, 5), nn.Linear(5, 11)
    with torch.no_grad():
        logp, _, logits = score_targets(hidden, head, torch.arange(7))
    assert logits is None
    torch.testing.assert_close(logp, head(hidden).log_softmax(-1)[range(7), range(7)])
    head.requires_grad_(False)
    score_targets(hidden, head, torch.arange(7))[0].sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_the_head_under_autocast_is_a_bfloat16_product():
    hidden, head, target = drawn(7, 5), nn.Linear(5, 11), torch.arange(7)
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.cross_entropy(head(hidden).float(), target, reduction="none").neg()
        found, _, logits = score_targets(hidden, head, target, logits=True)
    assert logits is not None
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(one.sum(), [hidden, head.weight, head.bias]) for one in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)


# --- attention inside rows ---

LENGTHS = [3, 1, 6, 4]


def attention(dropout: float = 0.0) -> RowAttention:
    lengths = torch.tensor(LENGTHS)
    row = torch.repeat_interleave(lengths)
    offset = functional.pad(lengths.cumsum(0), (1, 0)).int()
    return RowAttention(LENGTHS, offset, row, torch.arange(len(row)) - offset[row], dropout)


def masked(query: Tensor, key: Tensor, value: Tensor, row: Tensor) -> Tensor:
    """All positions at once under a mask of every pair, in plain arithmetic."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = torch.einsum("qnd,knd->nqk", query, key) / query.shape[-1] ** 0.5
    visible = (row[:, None] == row[None, :]).tril()
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)


def parts(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    count = sum(LENGTHS)
    return [drawn(count, heads, 8, seed=seed, dtype=dtype) for seed, heads in enumerate((4, 2, 2))]


@pytest.mark.parametrize("way", ["row_by_row", "padded"])
def test_attention_stays_inside_rows(way: str):
    inputs, attend = parts(), attention()
    found, expected = getattr(attend, way)(*inputs), masked(*inputs, attend.row)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upstream = drawn(*found.shape, seed=9)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_variable_length_kernel_is_given_what_it_documents(monkeypatch: pytest.MonkeyPatch):
    """No GPU here: a stand-in reads the documented arguments, and its result must be that of the other ways."""
    import torch.nn.attention.varlen as varlen

    def stand_in(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        begin: Tensor,
        begin_k: Tensor,
        longest: int,
        longest_k: int,
        **options: Any,
    ) -> Tensor:
        assert options == {"window_size": (-1, 0)}  # causal
        assert begin.dtype == torch.int32
        assert query.shape == key.shape == value.shape
        assert (longest, longest_k) == (max(LENGTHS), max(LENGTHS))
        assert torch.equal(begin, begin_k)
        return masked(query, key, value, torch.repeat_interleave(begin.diff()))

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    inputs, attend = parts(), attention()
    torch.testing.assert_close(attend.variable_length(*inputs), attend(*inputs), rtol=1e-5, atol=1e-5)


def test_dropout_of_attention_weights():
    torch.manual_seed(0)
    inputs = parts()
    found, exact = attention(dropout=0.5)(*inputs), attention()(*inputs)
    assert (found - exact).abs().max() > 0.1


@pytest.mark.parametrize(
    ("size", "capability", "expected"),
    [(64, (9, 0), True), (128, (8, 0), True), (64, (7, 5), False), (12, (9, 0), False), (512, (9, 0), False)],
)
def test_the_flash_kernel_is_asked_only_for_what_it_can(
    size: int, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
):
    """Other heads and older devices get the padded attention, which every device has."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode():
        assert flash_can(torch.zeros(3, 2, size, device="cuda")) is expected
    assert not flash_can(torch.zeros(3, 2, size))


def test_the_variable_length_kernel_takes_these_arguments():
    """By PyTorch's own signature, as far as that goes without a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    inspect.signature(varlen_attn).bind(*range(7), window_size=(-1, 0))
