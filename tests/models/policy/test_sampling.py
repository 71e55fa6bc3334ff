# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens: against the published code's nucleus, against plain loops, and as frequencies."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from parity import parity

from tts_align.models.base.generation import Sampling
from tts_align.models.policy.sampling import _largest_by_key, draw, nucleus, pick, uniforms

PLAIN = Sampling(top_p=1.0, top_k=0, repetition_window=0)


def test_nucleus_equals_the_published_one():
    io = parity("misc").io
    kept, token = nucleus(io["sample.logits"].softmax(-1), Sampling(top_p=0.8, top_k=25))
    size = io["sample.nucleus_size"]
    assert (kept > 0).sum(-1).tolist() == size.tolist()
    for row, count in enumerate(size.tolist()):
        assert token[row, :count].tolist() == io["sample.sorted_ids"][row, :count].tolist()
        torch.testing.assert_close(kept[row, :count], io["sample.nucleus_probs"][row, :count])


def slow_nucleus(probability: list[float], top_p: float, top_k: int) -> set[int]:
    """Most probable first, ties by id, until enough is kept."""
    kept, share = set(), 0.0
    for i in sorted(range(len(probability)), key=lambda i: (-probability[i], i)):
        if kept and (share >= top_p or (top_k and len(kept) >= top_k)):
            break
        kept.add(i)
        share += probability[i]
    return kept


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 16), min_size=1, max_size=12).filter(any),
    st.sampled_from([0.05, 0.3, 0.5, 0.8, 1.0]),
    st.integers(0, 14),
)
def test_nucleus_equals_a_loop(weight: list[int], top_p: float, top_k: int):
    total = 1 << (sum(weight) - 1).bit_length()  # a power of two: every share is exact
    weight = [*weight, total - sum(weight)]
    probability = [w / total for w in weight]
    kept, token = nucleus(torch.tensor([probability]), Sampling(top_p=top_p, top_k=top_k))
    found = {i for p, i in zip(kept[0].tolist(), token[0].tolist(), strict=True) if p > 0}
    wanted = {i for i in slow_nucleus(probability, top_p, top_k) if probability[i] > 0}
    assert sum(probability[i] for i in found) == sum(probability[i] for i in wanted)  # ties may fall either way
    assert len(found) == len(wanted)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 30), st.integers(1, 6))
def test_the_most_probable_are_those_of_a_stable_sort(seed: int, top_k: int, vocabulary: int, kinds: int):
    """Equal ones by id, which a top-k promises nothing about, as far as anything of them is kept."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, kinds + 1, (4, vocabulary), generator=random).float()
    weight[:, 0] += 1
    probability = weight / weight.sum(-1, keepdim=True)
    kept, token = nucleus(probability, Sampling(top_p=0.9, top_k=top_k))
    value, order = probability.sort(dim=-1, descending=True, stable=True)
    value, order = value[:, :top_k], order[:, :top_k]
    expected = torch.where(value.cumsum(-1) - value < 0.9, value, 0.0)
    assert torch.equal(kept, expected)
    assert torch.equal(token[expected > 0], order[expected > 0])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 6))
def test_the_way_that_waits_for_no_device_takes_the_same(seed: int, vocabulary: int, kinds: int):
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(0, kinds + 1, (3, vocabulary), generator=random) / kinds
    value, order = values.sort(dim=-1, descending=True, stable=True)
    for count in {1, (vocabulary + 1) // 2, vocabulary}:
        kept, token = _largest_by_key(values, count)
        assert torch.equal(kept, value[:, :count])
        assert torch.equal(token, order[:, :count])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20).filter(lambda w: sum(w) > 1e-3),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_pick_never_gives_what_has_no_weight(weight: list[float], uniform: float):
    index = int(pick(torch.tensor([weight]), torch.tensor([uniform])))
    assert weight[index] > 0


@pytest.mark.parametrize("weight", [[0.0, 0.2, 0.3, 0.0], [1.0, 0.0, 1e-12], [0.1] * 10, [0.0, 1e-45, 0.0]])
def test_pick_at_the_border(weight: list[float]):
    last = int(pick(torch.tensor([weight]), torch.tensor([float(np.nextafter(np.float32(1), np.float32(0)))])))
    assert weight[last] > 0
    assert weight[int(pick(torch.tensor([weight]), torch.tensor([0.0])))] > 0


def grid(count: int) -> torch.Tensor:
    """Numbers spread evenly over [0, 1): frequencies of what they draw are shares, to one count."""
    return (torch.arange(count) + 0.5) / count


def shares(logits: torch.Tensor, recent: list[int], sampling: Sampling, count: int = 200) -> torch.Tensor:
    """How often each token is drawn over a grid of both numbers."""
    first, second = torch.meshgrid(grid(count), grid(count), indexing="ij")
    uniform = torch.stack([first.flatten(), second.flatten()], -1)
    rows = len(uniform)
    drawn = draw(
        logits.expand(rows, -1).clone(), torch.tensor([recent], dtype=torch.long).expand(rows, -1), uniform, sampling
    )
    return torch.bincount(drawn, minlength=logits.shape[-1]) / rows


LOGITS = torch.tensor([1.0, 2.0, 0.5, -1.0, -torch.inf, 0.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float):
    found = shares(LOGITS, [], replace(PLAIN, temperature=temperature))
    torch.testing.assert_close(found, (LOGITS / temperature).softmax(-1), rtol=0, atol=0.006)


def test_temperature_0_takes_the_most_probable():
    assert shares(LOGITS, [1, 1, 1], Sampling(temperature=0.0))[1] == 1


def test_top_k_and_top_p_cut():
    assert (shares(LOGITS, [], replace(PLAIN, top_k=2)) > 0).nonzero().flatten().tolist() == [0, 1]
    assert (shares(LOGITS, [], replace(PLAIN, top_p=0.5)) > 0).nonzero().flatten().tolist() == [1]  # it holds 0.528


def test_a_repeated_token_is_drawn_again_from_everything_but_itself():
    """The published rule: a token within the last ten is replaced by a draw from the full softmax without it."""
    sampling = Sampling(top_p=0.5, top_k=0, repetition_window=10, repetition_share=0.1)
    found = shares(LOGITS, [-1] * 9 + [1], sampling)
    others = LOGITS.clone()
    others[1] = -torch.inf
    torch.testing.assert_close(found, others.softmax(-1), rtol=0, atol=0.006)
    torch.testing.assert_close(
        shares(LOGITS, [-1] * 9 + [0], sampling)[1], torch.tensor(1.0)
    )  # 0 is not in the nucleus


def test_how_many_repeats_are_too_many():
    sampling = Sampling(top_p=0.5, top_k=0, repetition_window=4, repetition_share=0.5)
    assert shares(LOGITS, [-1, -1, -1, 1], sampling)[1] == 1
    assert shares(LOGITS, [-1, 1, -1, 1], sampling)[1] == 0


def test_the_only_token_is_kept_however_often_it_came():
    only = torch.tensor([-torch.inf, 0.0, -torch.inf])
    assert shares(only, [1] * 10, Sampling())[1] == 1


def test_uniforms_belong_to_the_seed():
    both = uniforms([5, 6], 4)
    assert both.shape == (2, 4, 2)
    assert ((both >= 0) & (both < 1)).all()
    torch.testing.assert_close(uniforms([6], 4)[0], both[1], rtol=0, atol=0)
    torch.testing.assert_close(uniforms([6], 2)[0], both[1, :2], rtol=0, atol=0)  # a longer utterance begins alike
    assert (both[0] != both[1]).any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(2, 12), st.integers(0, 5))
def test_a_neighbour_changes_nothing(seed: int, vocabulary: int, top_k: int):
    random = torch.Generator().manual_seed(seed)
    logits, uniform = torch.randn(5, vocabulary, generator=random), torch.rand(5, 2, generator=random)
    recent = torch.randint(-1, vocabulary, (5, 3), generator=random)
    sampling = Sampling(top_p=0.9, top_k=top_k, repetition_window=3, repetition_share=0.3)
    together = draw(logits, recent, uniform, sampling)
    alone = [draw(logits[i : i + 1], recent[i : i + 1], uniform[i : i + 1], sampling) for i in range(5)]
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_k": -1}, "must not be negative"),
        ({"min_ratio": 3.0, "max_ratio": 3.0}, "0 <= min_ratio < max_ratio"),
        ({"repetition_share": 0.0}, "repetition_share must lie"),
        ({"top_p": 2.0, "temperature": -1.0}, "top_p must .*; temperature, top_k"),
    ],
)
def test_settings_that_cannot_work_are_refused(knobs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**knobs)
